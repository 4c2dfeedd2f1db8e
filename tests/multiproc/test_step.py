"""A step on two ranks: what each rank gets back, and what it refuses.

Every test launches two processes once and checks many things in them. The truth is the
same model as plain Keras in the same process, one call for each microbatch.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.models import CASES, loss_of, mlp, tape_step
from tests.ranks import ranks

M = 2
BATCH = 8
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


@contextlib.contextmanager
def session(**config: Any) -> Iterator[None]:
    smp.init({"partitions": 2, "microbatches": M, **config})
    yield
    smp.shutdown()


def seeded(base: type) -> Any:
    tf.keras.utils.set_random_seed(3)
    return mlp(base)


def plain() -> Any:
    """The same model in plain Keras, with its weights."""
    model = seeded(tf.keras.Model)
    model(tf.zeros([1, 32]))
    return model


def data(batch: int = BATCH) -> tuple[tf.Tensor, tf.Tensor]:
    return CASES["mlp"].data(batch)


def pieces(*tensors: tf.Tensor) -> list[tuple[tf.Tensor, ...]]:
    return list(zip(*(tf.split(tensor, M) for tensor in tensors)))


def raised(kind: type[Exception], call: Callable[[], Any]) -> str:
    """The error's text; a rank that gets none fails the test."""
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def check_training_step() -> None:
    """Gradients line up with the local variables; all of them are somewhere, once."""
    x, y = data()
    truth = plain()
    expected = [tape_step(truth)(*piece) for piece in pieces(x, y)]
    model = seeded(smp.DistributedModel)
    gradients, loss, outputs = smp.step(tape_step(model))(x, y)

    local = [v.name for v in model.trainable_variables]
    every = [v.name for v in model.global_variables]
    by_rank = smp.allgather(local, smp.WORLD)
    assert by_rank[0] and by_rank[1]
    assert sorted(by_rank[0] + by_rank[1]) == sorted(every)
    assert [n for n in every if n in local] == local, "not in the order of the model"
    assert [v.name for v in model.variables] == local  # it has no others
    assert len(gradients) == len(local)
    for gradient, variable in zip(gradients, model.trainable_variables):
        index = every.index(variable.name)
        for mb, (want, _, _) in enumerate(expected):
            np.testing.assert_allclose(gradient.outputs[mb], want[index], **CLOSE)
        mean = np.mean([want[index] for want, _, _ in expected], 0)
        np.testing.assert_allclose(gradient.accumulate(), mean, **CLOSE)
    for mb, (_, want_loss, want_outputs) in enumerate(expected):
        np.testing.assert_allclose(loss.outputs[mb], want_loss, **CLOSE)
        np.testing.assert_allclose(outputs.outputs[mb], want_outputs, **CLOSE)
    everywhere = smp.allgather(
        [each.numpy() for each in (*loss.outputs, *outputs.outputs)], smp.WORLD
    )
    for mine, other in zip(*everywhere, strict=True):
        np.testing.assert_array_equal(mine, other)


def check_returned_structures() -> None:
    model = seeded(smp.DistributedModel)

    @smp.step
    def step(x: tf.Tensor, y: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(y, model(x))
        variables = model.trainable_variables
        gradients = tape.gradient(loss, variables)
        clipped = [tf.clip_by_norm(gradient, 1e-3) for gradient in gradients]
        return {
            "by_name": dict(zip([v.name for v in variables], gradients)),
            "pairs": list(zip(gradients, clipped)),
            "clipped": tuple(clipped),
            "loss": loss,
            "text": "kept",
            "nothing": None,
        }

    result = step(*data())
    assert list(result) == ["by_name", "pairs", "clipped", "loss", "text", "nothing"]
    assert result["text"] == "kept" and result["nothing"] is None
    local = {variable.name for variable in model.trainable_variables}
    assert set(result["by_name"]) == {v.name for v in model.global_variables}
    for name, gradient in result["by_name"].items():
        assert (gradient is not None) == (name in local), name
    assert isinstance(result["clipped"], tuple)
    for gradient, variable in zip(
        result["clipped"], model.trainable_variables, strict=True
    ):
        assert gradient.outputs[0].shape == variable.shape
        assert tf.norm(gradient.outputs[0]) < 1.1e-3
    assert isinstance(result["loss"], smp.StepOutput)


def check_shared_partition() -> None:
    """Training and evaluation, a later step and a subset of layers: one partition."""
    x, y = data()
    model = seeded(smp.DistributedModel)
    train = smp.step(tape_step(model))
    train(x, y)
    names = [variable.name for variable in model.variables]

    @smp.step
    def evaluate(x: tf.Tensor, y: tf.Tensor) -> Any:
        outputs = model(x, training=False)
        return {"loss": loss_of(y, outputs), "outputs": outputs}

    result = evaluate(x, y)
    truth = plain()
    outputs = np.concatenate([truth(piece) for (piece,) in pieces(x)])
    np.testing.assert_allclose(result["outputs"].merge(), outputs, **CLOSE)
    np.testing.assert_allclose(
        result["loss"].reduce_mean(), loss_of(y, outputs), **CLOSE
    )
    half_x, half_y = data(4)  # another shape: traced again, partitioned as before
    evaluate(half_x, half_y)
    assert [variable.name for variable in model.variables] == names
    owner = model.placement.owner
    assert train.plan(x, y).owner == evaluate.plan(half_x, half_y).owner
    assert len(owner) == len(model.global_variables)


def check_graph_loop() -> None:
    """Inside a loop over a dataset and twice in one function; effects on all ranks."""
    x, y = data(3 * BATCH)
    truth = plain()
    model = seeded(smp.DistributedModel)
    mean = tf.keras.metrics.Mean()
    accuracy = tf.keras.metrics.SparseCategoricalAccuracy()
    counter = tf.Variable(0, trainable=False)

    @smp.step
    def step(x: tf.Tensor, y: tf.Tensor) -> Any:
        outputs = model(x)
        loss = loss_of(y, outputs)
        mean.update_state(loss)
        accuracy.update_state(y, outputs)
        counter.assign_add(1)
        return loss

    @tf.function
    def epoch(batches: tf.data.Dataset) -> Any:
        total = tf.constant(0.0)
        for x, y in batches:
            total += step(x, y).reduce_mean()
        return total

    @tf.function
    def twice(x: tf.Tensor, y: tf.Tensor) -> Any:
        return step(x, y).reduce_mean() + step(x, y).reduce_mean()

    batches = tf.data.Dataset.from_tensor_slices((x, y))
    batches = batches.batch(BATCH, drop_remainder=True)
    expected = [float(loss_of(b, truth(a))) for a, b in batches]
    np.testing.assert_allclose(epoch(batches), sum(expected), **CLOSE)
    assert int(counter) == 3 * M
    np.testing.assert_allclose(mean.result(), np.mean(expected), **CLOSE)
    right = np.argmax(truth(x), -1) == y.numpy()
    np.testing.assert_allclose(accuracy.result(), right.mean(), **CLOSE)
    np.testing.assert_allclose(twice(x[:BATCH], y[:BATCH]), 2 * expected[0], **CLOSE)
    assert int(counter) == 5 * M
    values = smp.allgather(
        (float(mean.result()), float(accuracy.result()), int(counter)), smp.WORLD
    )
    assert values[0] == values[1]


def check_unknown_batch() -> None:
    """input_signature with None: one trace for all sizes, also odd numbers of rows."""
    truth = plain()
    model = seeded(smp.DistributedModel)
    traced = []

    @smp.step(
        input_signature=[
            tf.TensorSpec([None, 32], tf.float32),
            tf.TensorSpec([None], tf.int64),
        ]
    )
    def step(x: tf.Tensor, y: tf.Tensor) -> Any:
        traced.append(x.shape)
        with tf.GradientTape() as tape:
            outputs = model(x)
            loss = loss_of(y, outputs)
        return tape.gradient(loss, model.trainable_variables), outputs

    for batch in (4, 6, 4, 2):
        x, y = data(batch)
        gradients, outputs = step(x, y)
        np.testing.assert_allclose(outputs.merge(), truth(x), **CLOSE)
        with tf.GradientTape() as tape:
            loss = loss_of(y, truth(x))
        want = dict(
            zip(
                [v.name for v in model.global_variables],
                tape.gradient(loss, truth.trainable_variables),
            )
        )
        for variable, gradient in zip(model.trainable_variables, gradients):
            np.testing.assert_allclose(
                gradient.reduce_mean(), want[variable.name], rtol=1e-4, atol=1e-6
            )
    assert [shape.as_list() for shape in traced] == [[None, 32]]
    with pytest.raises(smp.MicrobatchError, match=r"x.*\(3, 32\).*microbatches=2"):
        step(*data(3))


class Raw(smp.DistributedModel):
    """Variables without layers; ``scale`` is used everywhere, and so has a gradient of
    many parts from both ranks."""

    def __init__(self) -> None:
        super().__init__(name="raw")
        values = [tf.random.stateless_normal([7, 7], [i, 3]) for i in range(4)]
        self.kernels = [tf.Variable(v, name=f"w{i}") for i, v in enumerate(values)]
        self.scale = tf.Variable(1.0, name="scale")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        for kernel in self.kernels:
            x = tf.tanh(tf.einsum("btd,de->bte", x, kernel)) * self.scale
        return tf.reduce_mean(x, 1)


def loss_of_raw(outputs: tf.Tensor) -> tf.Tensor:
    return tf.reduce_mean(outputs**2) + 0.01 * tf.reduce_sum(outputs)


def check_sums_of_many_gradients() -> None:
    """The order of a sum of four gradients is that of the uncut function, to the bit:
    AddN's kernel begins with any input that it may overwrite."""
    x = tf.random.stateless_normal([8, 4, 7], [1, 1])
    model = Raw()

    @smp.step
    def step(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of_raw(model(x))
        gradients = tape.gradient(loss, model.trainable_variables)
        return dict(zip([v.name for v in model.trainable_variables], gradients))

    gradients = step(x)
    assert len(step.plan(x).segments.segments) > 4
    weights = {
        name: value
        for part in smp.allgather(
            [(v.name, v.numpy()) for v in model.variables], smp.WORLD
        )
        for name, value in part
    }
    for variable in model.global_variables:
        variable.assign(weights[variable.name])

    @tf.function
    def uncut(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of_raw(model.call(x))
        return tape.gradient(loss, model.global_variables)

    for mb, (piece,) in enumerate(pieces(x)):
        for variable, want in zip(model.global_variables, uncut(piece)):
            if gradients[variable.name] is not None:
                got = gradients[variable.name].outputs[mb]
                np.testing.assert_array_equal(got, want, variable.name)


@ranks(2, timeout=240)
def test_steps_on_two_ranks() -> None:
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    for check in (
        check_training_step,
        check_returned_structures,
        check_shared_partition,
        check_graph_loop,
        check_unknown_batch,
        check_sums_of_many_gradients,
    ):
        with session():
            check()
        print(check.__name__, "passed", flush=True)


def check_different_code() -> None:
    model = seeded(smp.DistributedModel)
    rank = smp.rank()

    @smp.step
    def step(x: tf.Tensor, y: tf.Tensor) -> Any:
        outputs = model(x)
        if rank == 1:
            outputs = tf.atan(outputs, name="only_on_one")
        return loss_of(y, outputs)

    text = raised(smp.TraceError, lambda: step(*data()))
    assert "only_on_one" in text and "Atan" in text and "rank 1" in text, text
    assert "'step'" in text, text
    assert model.placement is None


def check_different_shape() -> None:
    model = seeded(smp.DistributedModel)
    step = smp.step(tape_step(model))
    batch = BATCH if smp.rank() == 0 else BATCH // 2
    text = raised(smp.TraceError, lambda: step(*data(batch)))
    assert "rank 1" in text and "argument" in text, text


def check_different_constant() -> None:
    model = seeded(smp.DistributedModel)

    @smp.step
    def step(x: tf.Tensor, factor: float) -> Any:
        return tf.reduce_sum(model(x)) * factor

    text = raised(smp.TraceError, lambda: step(data()[0], 1.0 + smp.rank()))
    assert "rank 1" in text and "Const" in text, text


def check_different_order() -> None:
    """Ranks that call their steps in another order hear the names of both."""
    model = seeded(smp.DistributedModel)

    @smp.step
    def first(x: tf.Tensor) -> Any:
        return model(x)

    @smp.step
    def second(x: tf.Tensor) -> Any:
        return tf.reduce_sum(model(x))

    step = first if smp.rank() == 0 else second
    text = raised(smp.TraceError, lambda: step(data()[0]))
    assert "'first'" in text and "'second'" in text, text
    # Nothing is left behind: the same steps in the same order work.
    truth = plain()(data()[0])
    np.testing.assert_allclose(first(data()[0]).merge(), truth, **CLOSE)


@ranks(2, timeout=120)
def test_ranks_that_trace_differently_all_get_the_difference() -> None:
    for check in (
        check_different_code,
        check_different_shape,
        check_different_constant,
        check_different_order,
    ):
        with session():
            check()
        print(check.__name__, "passed", flush=True)


class Placed(smp.DistributedModel):
    """By hand: ``first`` on 0, ``second`` on 1, nested to 0 again; ``rest`` nowhere."""

    def __init__(self) -> None:
        super().__init__(name="placed")
        dense = tf.keras.layers.Dense
        self.first, self.second = dense(6, name="first"), dense(5, name="second")
        self.inner, self.rest = dense(4, name="inner"), dense(3, name="rest")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        with smp.partition(0):
            x = self.first(x)
        with smp.partition(1):
            x = self.second(x)
            with smp.partition(0):
                x = self.inner(x)
            x = tf.tanh(x)
        return self.rest(x)


class Conflict(smp.DistributedModel):
    """The embedding is used on both partitions."""

    def __init__(self) -> None:
        super().__init__(name="conflict")
        self.embed = tf.keras.layers.Embedding(7, 4, name="embed")
        self.dense = tf.keras.layers.Dense(4, name="dense")

    def call(self, tokens: tf.Tensor) -> tf.Tensor:
        with smp.partition(0):
            x = self.embed(tokens)
        with smp.partition(1):
            x = self.dense(x)
            return tf.matmul(x, self.embed.embeddings, transpose_b=True)


@ranks(2, timeout=120)
def test_manual_partition() -> None:
    x = tf.random.stateless_normal([4, 8], [1, 2])
    with session(auto_partition=False, default_partition=1):
        tf.keras.utils.set_random_seed(5)
        model = Placed()

        @smp.step
        def step(x: tf.Tensor) -> Any:
            with tf.GradientTape() as tape:
                outputs = model(x)
                loss = tf.reduce_mean(outputs**2)
            return tape.gradient(loss, model.trainable_variables), outputs

        gradients, outputs = step(x)
        where = smp.allgather([v.name for v in model.variables], smp.WORLD)
        layers_of = [{name.split("/")[-2] for name in names} for names in where]
        assert layers_of == [{"first", "inner"}, {"second", "rest"}]
        for gradient, variable in zip(
            gradients, model.trainable_variables, strict=True
        ):
            assert gradient.outputs[0].shape == variable.shape
        stages = [s.partition for s in step.plan(x).segments.segments]
        assert stages == [0, 1, 0, 1, 1, 0, 1, 0]
        weights = {
            name.split("placed/")[-1]: value
            for part in smp.allgather(
                [(v.name, v.numpy()) for v in model.variables], smp.WORLD
            )
            for name, value in part
        }

        def dense(value: Any, layer: str) -> Any:
            return value @ weights[f"{layer}/kernel:0"] + weights[f"{layer}/bias:0"]

        inner = dense(dense(dense(x.numpy(), "first"), "second"), "inner")
        np.testing.assert_allclose(
            outputs.merge(), dense(np.tanh(inner), "rest"), **CLOSE
        )
        for index in (2, -1):
            text = raised(
                smp.PartitionError, lambda: smp.partition(index).__enter__()
            )
            assert "0..1" in text and f"index={index}" in text, text

    with session(auto_partition=False, default_partition=0):
        model = Conflict()
        step = smp.step(lambda tokens: model(tokens))
        text = raised(smp.PartitionError, lambda: step(tf.ones([4, 3], tf.int32)))
        assert "conflict/embed/embeddings" in text, text
        assert "partition 0: layer 'conflict/embed'" in text, text
        assert "partition 1: layer 'conflict'" in text, text
    with session():  # the same model, automatically: together, and one warning
        with pytest.warns(UserWarning, match="auto_partition is true") as warned:
            model = Conflict()
            step = smp.step(lambda tokens: model(tokens))
            step(tf.ones([4, 3], tf.int32))
        # Others may warn as well: tf-keras 2.18 does when it draws a seed.
        assert sum(w.category is UserWarning for w in warned) == 1
        assert sorted(smp.allgather(len(model.variables), smp.WORLD)) == [1, 2]
