"""Replicas that train on parts of a batch: the weights of one process with all of it.

A loop of one's own around ``smp.step``; for ``fit`` see tests/keras/test_replicas.py.
"""

import threading
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.frontend.hooks.optimizer_slots import every_slot
from tests.ranks import run_ranks

keras = tf.keras
new, legacy = keras.optimizers, keras.optimizers.legacy
STEPS, ROWS = 6, 16  # ROWS: of the batch of all replicas

OPTIMIZERS = {
    "SGD": lambda: new.SGD(0.1),
    "momentum": lambda: new.SGD(0.1, momentum=0.9, global_clipnorm=0.5),
    "Adam": lambda: new.Adam(0.01),
    "legacy Adam": lambda: legacy.Adam(0.01),
}
FLOATS = {"rtol": 1e-5, "atol": 2e-6}
"""What float32 sums in another order leave after STEPS updates. Adam divides by the
square root of what it has seen: what is tiny there is not as close as the rest."""


def net(base: type) -> Any:
    """An embedding, which has sparse gradients, and four layers."""

    class Net(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="net")
            self.embedding = keras.layers.Embedding(9, 4)
            self.stack = [keras.layers.Dense(4, "tanh") for _ in range(3)]
            self.head = keras.layers.Dense(1)

        def call(self, x: tf.Tensor) -> tf.Tensor:
            x = tf.reduce_mean(self.embedding(x), 1)
            for layer in self.stack:
                x = layer(x)
            return self.head(x)

    keras.utils.set_random_seed(1)
    return Net()


def batch(number: int) -> tuple[Any, Any]:
    chance = np.random.default_rng(number)
    x = chance.integers(0, 9, [ROWS, 3])
    return x, chance.normal(size=[ROWS, 1]).astype(np.float32)


def forward(model: Any, x: Any, y: Any) -> Any:
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - y) ** 2)
    return tape.gradient(loss, model.trainable_variables), loss


def plainly(make: Any) -> list[np.ndarray]:
    model, optimizer = net(keras.Model), make()

    @tf.function
    def train(x: tf.Tensor, y: tf.Tensor) -> None:
        gradients, _ = forward(model, x, y)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))

    for number in range(STEPS):
        train(*map(tf.constant, batch(number)))
    return [variable.numpy() for variable in model.trainable_variables]


def distributed(make: Any) -> tuple[Any, Any, Any]:
    model = net(smp.DistributedModel)
    optimizer = smp.DistributedOptimizer(make())
    step = smp.step(lambda x, y: forward(model, x, y))

    @tf.function
    def train(xs: tf.Tensor, ys: tf.Tensor) -> tf.Tensor:
        mean = 0.0
        for i in tf.range(tf.shape(xs)[0]):  # all of it in a loop
            gradients, losses = step(xs[i], ys[i])
            means = [gradient.accumulate() for gradient in gradients]
            optimizer.apply_gradients(zip(means, model.trainable_variables))
            mean = smp.allreduce(losses.reduce_mean())
        return mean

    mine = slice(smp.dp_rank(), None, smp.dp_size())
    batches = [batch(number) for number in range(STEPS)]
    xs, ys = (np.stack([each[i][mine] for each in batches]) for i in range(2))
    train(tf.constant(xs[:2]), tf.constant(ys[:2]))
    last = train(tf.constant(xs[2:]), tf.constant(ys[2:]))
    return model, optimizer, float(last)


def compare(name: str, **config: Any) -> None:
    make = OPTIMIZERS[name]
    smp.init({"microbatches": 2, "horovod": True, "timeout_s": 30, **config})
    model, optimizer, last = distributed(make)
    expected = plainly(make)
    every = [variable.name for variable in model.global_trainable_variables]
    mine = model.trainable_variables
    for variable in mine:
        whole = expected[every.index(variable.name)]
        about = f"{name} {config}: {variable.name}"
        np.testing.assert_allclose(variable, whole, **FLOATS, err_msg=about)
    bits = [variable.numpy().tobytes() for variable in mine]
    assert len(set(map(tuple, smp.allgather(bits, smp.DP_GROUP)))) == 1
    losses = smp.allgather(last, smp.WORLD)
    assert len(set(losses)) == 1, losses
    assert int(optimizer.iterations) == STEPS
    slots = sum(np.prod(each.shape) for each in every_slot(optimizer))
    total = sum(smp.allgather(int(slots), smp.DP_GROUP))
    weights = sum(int(np.prod(variable.shape)) for variable in mine)
    of_each = {"SGD": 0, "momentum": 1}.get(name, 2)
    if isinstance(optimizer, new.SGD):
        of_each = 1  # it makes the slot whether it uses it or not
    copies = 1 if config.get("shard_optimizer_state") else smp.dp_size()
    assert total == copies * of_each * weights, (name, config)
    smp.shutdown()


LAYOUTS = (
    {"partitions": 2},
    {"partitions": 2, "placement_strategy": "spread", "shard_optimizer_state": True},
    {"partitions": 1},
    {"partitions": 1, "shard_optimizer_state": True},
)


def train_in_all_layouts() -> None:
    for place, name in enumerate(OPTIMIZERS):
        # Each optimizer with and without sharding, and each layout with several.
        for layout in LAYOUTS[:2] if place < 2 else (LAYOUTS[place % 2], *LAYOUTS[2:]):
            compare(name, **layout)


@pytest.mark.timeout(220)
def test_replicas_train_as_one_process_with_the_whole_batch() -> None:
    run_ranks(4, train_in_all_layouts, timeout=210)


# --- scripts that know of Horovod


def own_loop(is_scaled: bool, base: type) -> tuple[Any, Any, list[float]]:
    """Gradients averaged by Horovod, and then clipped by the norm of the whole model;
    or scaled, and in one step the last of them is not finite."""
    is_alone = base is keras.Model
    model, optimizer = net(base), new.SGD(0.1)
    if is_scaled:
        optimizer = keras.mixed_precision.LossScaleOptimizer(
            optimizer, initial_scale=8.0, dynamic_growth_steps=2
        )

    def forward_backward(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
            if is_scaled:
                loss = optimizer.get_scaled_loss(loss)
        return tape.gradient(loss, model.trainable_variables)

    step = forward_backward if is_alone else smp.step(forward_backward)

    def averaged(gradients: Any) -> Any:
        import horovod.tensorflow as hvd

        if is_alone:
            return gradients
        return [hvd.allreduce(each.accumulate()) for each in gradients]

    @tf.function
    def train(x: tf.Tensor, y: tf.Tensor, is_spoiled: tf.Tensor) -> None:
        gradients, variables = averaged(step(x, y)), model.trainable_variables
        if is_scaled:
            gradients = optimizer.get_unscaled_gradients(gradients)
            if variables[-1].shape == [1]:  # of the head
                gradients[-1] += tf.where(is_spoiled, np.inf, 0.0)
        else:
            clip = tf.clip_by_global_norm if is_alone else smp.clip_by_global_norm
            gradients, _ = clip(gradients, 0.2)
        optimizer.apply_gradients(zip(gradients, variables))

    mine = slice(None) if is_alone else slice(smp.dp_rank(), None, smp.dp_size())
    scales = []
    for number in range(STEPS):
        x, y = (tf.constant(each[mine]) for each in batch(number))
        train(x, y, tf.constant(number == 2))
        scales.append(float(optimizer.loss_scale) if is_scaled else 1.0)
    return model, optimizer, scales


def train_by_horovod() -> None:
    smp.init({"partitions": 2, "microbatches": 2, "horovod": True, "timeout_s": 30})
    for is_scaled in (False, True):
        plain, _, expected = own_loop(is_scaled, keras.Model)
        model, optimizer, scales = own_loop(is_scaled, smp.DistributedModel)
        assert scales == expected, (scales, expected)
        assert int(optimizer.iterations) == STEPS
        every = [variable.name for variable in model.global_trainable_variables]
        for variable in model.trainable_variables:
            whole = plain.trainable_variables[every.index(variable.name)]
            np.testing.assert_allclose(variable, whole, **FLOATS, err_msg=variable.name)


@pytest.mark.timeout(120)
def test_scripts_that_average_clip_and_scale_by_themselves() -> None:
    run_ranks(4, train_by_horovod, timeout=110)


# --- nothing waits for more than it needs


class Telling:
    """A compression that says when an average is there."""

    there = threading.Event()

    @staticmethod
    def compress(tensor: tf.Tensor) -> tuple[tf.Tensor, None]:
        return tensor, None

    @classmethod
    def decompress(cls, tensor: tf.Tensor, context: None) -> tf.Tensor:
        def tell(value: tf.Tensor) -> tf.Tensor:
            cls.there.set()
            return value

        if tensor.dtype != tf.float32:
            return tensor
        told = tf.py_function(tell, [tensor], tensor.dtype)
        return tf.ensure_shape(told, tensor.shape)


def overlap(is_sharded: bool) -> None:
    """The second gradient is not there before the first one is averaged."""
    config = {"partitions": 1, "horovod": True, "shard_optimizer_state": is_sharded}
    smp.init({**config, "timeout_s": 30})
    early, late = tf.Variable([1.0, 2.0]), tf.Variable(3.0, dtype=tf.float64)
    optimizer = smp.DistributedOptimizer(new.SGD(1.0), compression=Telling)
    Telling.there.clear()
    tells = not is_sharded or smp.dp_rank() == 0  # that of the largest variable

    def wait(value: tf.Tensor) -> tf.Tensor:
        assert not tells or Telling.there.wait(20), "the first average did not come"
        return value

    @tf.function
    def train(x: tf.Tensor) -> None:
        slow = tf.py_function(wait, [tf.cast(x, tf.float64)], tf.float64)
        slow.set_shape([])
        pairs = [(x * tf.ones([2]), early), (slow, late)]
        optimizer.apply_gradients(pairs)

    for number in range(2):
        train(tf.constant(float(smp.dp_rank() + number)))
    np.testing.assert_array_equal(early, [-1.0, 0.0])
    assert float(late) == 1.0
    smp.shutdown()


def overlap_in_backward() -> None:
    """The way back stops between two layers until the gradient of the second one, which
    it has made by then, is averaged."""
    smp.init({"partitions": 1, "horovod": True, "timeout_s": 30})

    def wait(value: np.ndarray) -> np.ndarray:
        assert Telling.there.wait(20), "the average of the last layer did not come"
        return value

    @tf.custom_gradient
    def waiting(x: tf.Tensor) -> Any:
        def backward(upstream: tf.Tensor) -> tf.Tensor:
            slow = tf.numpy_function(wait, [upstream], upstream.dtype)
            return tf.ensure_shape(slow, upstream.shape)

        return tf.identity(x), backward

    class Net(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__()
            # Each gradient is more than travels with another.
            self.stack = [keras.layers.Dense(1500, use_bias=False) for _ in range(2)]

        def call(self, x: tf.Tensor) -> tf.Tensor:
            return self.stack[1](waiting(self.stack[0](x)))

    model = Net()
    optimizer = smp.DistributedOptimizer(new.SGD(0.1), compression=Telling)

    @smp.step
    def forward_backward(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    @tf.function
    def train(x: tf.Tensor) -> None:
        means = [gradient.accumulate() for gradient in forward_backward(x)]
        optimizer.apply_gradients(zip(means, model.trainable_variables))

    for _ in range(2):
        smp.barrier()
        Telling.there.clear()
        train(tf.ones([2, 1500]))
    smp.shutdown()


def control_inputs() -> None:
    """In the graph of a train step, an average has its gradients for inputs only."""
    for is_sharded in (False, True):
        smp.init(
            {"partitions": 1, "horovod": True, "shard_optimizer_state": is_sharded}
        )
        model = net(smp.DistributedModel)
        optimizer = smp.DistributedOptimizer(new.SGD(0.1))
        step = smp.step(lambda x, y: forward(model, x, y))

        @tf.function
        def train(x: tf.Tensor, y: tf.Tensor) -> None:
            gradients, _ = step(x, y)
            means = [gradient.accumulate() for gradient in gradients]
            optimizer.apply_gradients(zip(means, model.trainable_variables))

        x, y = map(tf.constant, batch(0))
        train(x, y)
        graph = train.get_concrete_function(x, y).graph
        calls = [
            operation
            for operation in graph.get_operations()
            if "f" in operation.node_def.attr
            and "smp_mean" in operation.get_attr("f").name
        ]
        assert len(calls) == (3 if is_sharded else 2), calls
        assert not [each for call in calls for each in call.control_inputs]
        smp.shutdown()


def check_overlap() -> None:
    overlap(False)
    overlap(True)
    overlap_in_backward()
    control_inputs()


@pytest.mark.timeout(100)
def test_an_average_waits_for_its_own_gradients_only() -> None:
    # A thread for the function that waits.
    run_ranks(2, check_overlap, timeout=90, env={"TF_NUM_INTEROP_THREADS": "4"})
