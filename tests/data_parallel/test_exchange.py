"""What replicas exchange: against plain Horovod; ``smp.allreduce``; what is refused."""

import copy
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.data_parallel.exchange import exchange_for
from smp_tf.data_parallel.sharding import owners
from tests.ranks import run_ranks

new, legacy = tf.keras.optimizers, tf.keras.optimizers.legacy
LossScale = tf.keras.mixed_precision.LossScaleOptimizer
SECONDS = 20.0

TYPES = ("float16", "bfloat16", "float32", "float64", "complex64")
SHAPES = ([3, 2], [4], [], [300, 7])


def start(**config: Any) -> None:
    smp.init({"partitions": 2, "horovod": True, "timeout_s": SECONDS, **config})


def value(seed: int, shape: Any, dtype: str = "float32") -> tf.Tensor:
    found = np.random.default_rng(seed).normal(size=shape).astype("float32")
    if dtype == "complex64":
        return tf.complex(tf.constant(found), tf.constant(-found))
    return tf.cast(found, dtype)


def average_as_horovod_does() -> None:
    import horovod.tensorflow as hvd

    assert (hvd.size(), hvd.rank()) == (smp.dp_size(), smp.dp_rank())
    me = smp.dp_rank()
    shapes = [(dtype, shape) for dtype in TYPES for shape in SHAPES]
    gradients: list[Any] = [
        value(100 * me + i, shape, dtype) for i, (dtype, shape) in enumerate(shapes)
    ]
    variables = [tf.Variable(tf.zeros_like(gradient)) for gradient in gradients]
    rows = value(7 + me, [me + 1, 2])  # another number of them on each replica
    places = tf.range(me, 2 * me + 1)
    gradients += [None, tf.IndexedSlices(rows, places, tf.constant([5, 2]))]
    variables += [tf.Variable([1.0]), tf.Variable(tf.zeros([5, 2]))]
    for compression in (None, hvd.Compression.fp16):

        def found() -> list[Any]:
            exchange = exchange_for(gradients, variables, compression)
            return exchange.averaged(gradients)

        for each in (found(), tf.function(found)()):
            pairs = list(zip(gradients, each, owners(variables), strict=True))
            for i, (gradient, mean, owner) in enumerate(pairs):
                if gradient is None:
                    assert mean is None
                    continue
                plain = plainly(hvd, gradient, compression or hvd.Compression.none, i)
                if smp.config().shard_optimizer_state and owner != me:
                    assert mean is None
                else:
                    assert_same(mean, plain)


def plainly(hvd: Any, gradient: Any, compression: Any, number: int) -> Any:
    """hvd.allreduce; the types it does not know as others."""
    reduce = hvd.allreduce
    if isinstance(gradient, tf.IndexedSlices):
        return reduce(gradient)
    about = {"compression": compression, "name": f"plain_{number}"}
    if gradient.dtype == tf.bfloat16:
        mean = reduce(tf.cast(gradient, tf.float32), **about)
        return tf.cast(mean, tf.bfloat16)
    if gradient.dtype.is_complex:  # not compressed: fp16 is for numbers that are real
        real = reduce(tf.math.real(gradient), name=f"real_{number}")
        return tf.complex(real, reduce(tf.math.imag(gradient), name=f"imag_{number}"))
    return reduce(gradient, **about)


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, tf.IndexedSlices):
        np.testing.assert_array_equal(found.indices, expected.indices)
        found, expected = found.values, expected.values
    assert found.dtype == expected.dtype and found.shape == expected.shape
    np.testing.assert_array_equal(
        found.numpy().astype("complex128"), expected.numpy().astype("complex128")
    )


def allreduce_groups() -> None:
    rank, size = smp.rank(), smp.size()
    every = [value(i, [5]).numpy() for i in range(size)]
    groups = {
        smp.WORLD: range(size),
        smp.DP_GROUP: smp.get_dp_group(),
        smp.PP_GROUP: smp.get_pp_group(),
        smp.MP_GROUP: smp.get_mp_group(),
        smp.TP_GROUP: [rank],
    }
    for group, ranks in groups.items():
        total = every[ranks[0]].copy()
        for each in ranks[1:]:
            total = total + every[each]
        for op, expected in (("sum", total), ("mean", total / np.float32(len(ranks)))):
            reduce = tf.function(smp.allreduce)
            for found in (
                smp.allreduce(every[rank], group, op),
                reduce(tf.constant(every[rank]), group, op=op),
            ):
                np.testing.assert_array_equal(found, expected)
    # Long ones go in pieces, also where these are not equal.
    long = [value(10 + i, [101, 333]).numpy() for i in range(size)]
    found = smp.allreduce(tf.constant(long[rank]), smp.WORLD, op="sum")
    np.testing.assert_array_equal(found, ((long[0] + long[1]) + long[2]) + long[3])

    @tf.function(input_signature=[tf.TensorSpec([None])])
    def of_unknown(x: tf.Tensor) -> tf.Tensor:
        return smp.allreduce(x)

    mean = np.mean(smp.get_dp_group())
    np.testing.assert_array_equal(of_unknown([1.0, rank]), [1.0, mean])
    assert int(smp.allreduce(rank, smp.WORLD, op="sum")) == sum(range(size))
    place = tf.constant([smp.dp_rank()])
    slices = tf.IndexedSlices(tf.constant([[1.0]]), place, tf.constant([2, 1]))
    np.testing.assert_array_equal(smp.allreduce(slices), [[0.5], [0.5]])

    x = tf.Variable([2.0, 3.0])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(smp.allreduce(x * (rank + 1.0), smp.WORLD, "sum") ** 2)
    # d/dx of the sum of all ranks' losses: each of them depends on this rank's x.
    expected = size * 2 * 10 * x.numpy() * (rank + 1)
    np.testing.assert_allclose(tape.gradient(loss, x), expected, rtol=1e-6)


def keep_the_object() -> None:
    assert smp.config().horovod
    variable = tf.Variable([1.0])
    optimizer = new.AdamW(0.1, weight_decay=0.5)
    rate = optimizer.learning_rate
    same = smp.DistributedOptimizer(optimizer)
    assert same is optimizer is smp.DistributedOptimizer(same)
    assert isinstance(same, new.AdamW) and same.learning_rate is rate
    plain = new.AdamW(0.1, weight_decay=0.5)
    assert new.serialize(same) == new.serialize(plain)
    assert type(type(same).from_config(same.get_config())) is new.AdamW
    assert type(copy.copy(same)) is new.AdamW
    same.apply_gradients([(tf.constant([1.0]), variable)])
    scaled = smp.DistributedOptimizer(LossScale(new.SGD(0.1)))
    assert isinstance(scaled, LossScale) and float(scaled.loss_scale) == 2.0**15
    scaled = smp.DistributedOptimizer(LossScale(legacy.SGD(0.1)))
    assert isinstance(scaled, LossScale)
    old = smp.DistributedOptimizer(legacy.Adam(0.1))
    assert isinstance(old, legacy.Adam) and float(old.learning_rate) == np.float32(0.1)
    # Named twice, and around what is named: averaged once, the scale taken out.
    inner = smp.DistributedOptimizer(new.SGD(1.0))
    outer = smp.DistributedOptimizer(LossScale(inner, dynamic=False, initial_scale=4.0))
    before = variable.numpy()
    outer.get_scaled_loss(tf.constant(1.0))
    means = outer.get_unscaled_gradients([tf.constant([4.0 * smp.dp_rank()])])
    outer.apply_gradients(zip(means, [variable]))
    np.testing.assert_allclose(variable, before - 0.5)


def everything() -> None:
    start()
    average_as_horovod_does()
    allreduce_groups()
    keep_the_object()
    smp.shutdown()
    start(shard_optimizer_state=True)
    average_as_horovod_does()
    keep_the_object()


@pytest.mark.timeout(120)
def test_means_are_those_of_horovod() -> None:
    run_ranks(4, everything, timeout=110)


def add_in_order() -> None:
    """At each owner, the same sum; and no more than one gradient beside it."""
    start(partitions=1, shard_optimizer_state=True)
    shapes = [[300, 7], [2000], [40, 30], [2, 2, 250]]
    every = [
        [value(10 * rank + i, shape) for i, shape in enumerate(shapes)]
        for rank in range(smp.size())
    ]
    gradients = every[smp.rank()]
    variables = [tf.Variable(tf.zeros(shape)) for shape in shapes]
    places = owners(variables)
    assert sorted(places) == [0, 1, 2, 3]
    exchange = exchange_for(gradients, variables)
    means = tf.function(lambda: exchange.averaged(gradients))()
    rank = smp.dp_rank()
    mine = places.index(rank)
    a, b, c, d = (gradients[mine].numpy() for gradients in every)
    np.testing.assert_array_equal(means[mine], (((a + b) + c) + d) / 4)
    (waits,) = (
        [
            [before.type for before in operation.control_inputs]
            for operation in function.graph.get_operations()
            if operation.type == "SmpRecvWait"
        ]
        for function in exchange._functions.values()
        if function.structured_outputs
    )
    assert len(waits) == 3
    # All that come when there is a sum.
    assert sum("PartitionedCall" in each for each in waits) == (2, 2, 1, 1)[rank], waits


@pytest.mark.timeout(60)
def test_owners_add_up_one_after_the_other() -> None:
    run_ranks(4, add_in_order, timeout=50)


# --- bad use


def other_optimizers() -> None:
    optimizer = smp.DistributedOptimizer(new.SGD(0.1, clipnorm=1.0 + smp.dp_rank()))
    optimizer.apply_gradients([(tf.constant([1.0]), tf.Variable([1.0]))])


def other_variables() -> None:
    shape = [2 + smp.dp_rank()]
    pairs = [(tf.ones([1]), tf.Variable([1.0], name="same"))]
    pairs.append((tf.ones(shape), tf.Variable(tf.ones(shape), name="other")))
    smp.DistributedOptimizer(new.SGD(0.1)).apply_gradients(pairs)


def fewer_variables() -> None:
    pairs = [(tf.ones([1]), tf.Variable([1.0])) for _ in range(1 + smp.dp_rank())]
    smp.DistributedOptimizer(new.SGD(0.1)).apply_gradients(pairs)


def no_gradient_on_one() -> None:
    gradient = None if smp.dp_rank() else tf.ones([1])
    pairs = [(gradient, tf.Variable([1.0])), (tf.ones([1]), tf.Variable([1.0]))]
    smp.DistributedOptimizer(new.SGD(0.1)).apply_gradients(pairs)


def other_compression() -> None:
    import horovod.tensorflow as hvd

    chosen = (hvd.Compression.fp16, hvd.Compression.none)[smp.dp_rank()]
    optimizer = smp.DistributedOptimizer(new.SGD(0.1), compression=chosen)
    optimizer.apply_gradients([(tf.ones([1]), tf.Variable([1.0]))])


def model_and_step(inside: Any = None) -> tuple[Any, Any]:
    class Net(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__()
            self.stack = [tf.keras.layers.Dense(3) for _ in range(3)]

        def call(self, x: tf.Tensor) -> tf.Tensor:
            for layer in self.stack:
                x = layer(x)
            return x

    model = Net()

    @smp.step
    def step(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x))
        gradients = tape.gradient(loss, model.trainable_variables)
        if inside is not None:
            inside(gradients, model)
        return gradients

    return model, step


def variables_of_all() -> None:
    model, step = model_and_step()
    gradients = [gradient.accumulate() for gradient in step(tf.ones([2, 3]))]
    optimizer = smp.DistributedOptimizer(new.SGD(0.1))
    foreign = [
        variable
        for variable, spec in zip(model.global_variables, model.global_variable_specs)
        if spec.partition != smp.pp_rank()
    ]
    optimizer.apply_gradients(zip(gradients, foreign))


def inside_a_step() -> None:
    optimizer = smp.DistributedOptimizer(new.SGD(0.1))
    _, step = model_and_step(
        lambda gradients, model: optimizer.apply_gradients(
            zip(gradients, model.trainable_variables)
        )
    )
    step(tf.ones([2, 3]))


def averaged_before() -> None:
    optimizer = smp.DistributedOptimizer(new.SGD(0.1))
    pairs = [(tf.ones([1]), tf.Variable([1.0]))]
    optimizer.apply_gradients(pairs, skip_gradients_aggregation=True)


def scaled_around() -> None:
    """An infinity on one replica: that one skips the update without a word."""
    optimizer = LossScale(smp.DistributedOptimizer(new.SGD(0.1)))
    optimizer.get_scaled_loss(tf.constant(1.0))
    gradient = optimizer.get_unscaled_gradients([tf.ones([1])])[0]
    optimizer.apply_gradients([(gradient, tf.Variable([1.0]))])


def legacy_scaled_around() -> None:
    optimizer = LossScale(smp.DistributedOptimizer(legacy.SGD(0.1)))
    optimizer.get_scaled_loss(tf.constant(1.0))
    gradient = optimizer.get_unscaled_gradients([tf.ones([1])])[0]
    optimizer.apply_gradients([(gradient, tf.Variable([1.0]))])


def allreduce_in_a_step() -> None:
    _, step = model_and_step(lambda gradients, model: smp.allreduce(gradients[0]))
    step(tf.ones([2, 3]))


def no_sum_of_that() -> None:
    smp.allreduce(tf.constant(["text"]))


def no_mean_of_integers() -> None:
    smp.allreduce(tf.constant([1, 2]))


def no_such_op() -> None:
    smp.allreduce(tf.constant([1.0]), op="max")


def no_such_group() -> None:
    smp.allreduce(tf.constant([1.0]), "world")  # type: ignore[arg-type]


def allreduce_other_shapes() -> None:
    smp.allreduce(tf.ones([2 + smp.dp_rank()]))


def no_optimizer() -> None:
    smp.DistributedOptimizer("sgd")


def no_compression() -> None:
    smp.DistributedOptimizer(new.SGD(0.1), compression="fp16")


LEAVE_OUT = (smp.SmpError, "smp.DistributedOptimizer(LossScaleOptimizer(optimizer))")
REFUSED: dict[Callable[[], None], tuple[type[BaseException], str]] = {
    other_optimizers: (smp.SmpError, "rank 2: SGD(clipnorm=2.0); rank 3: SGD("),
    other_variables: (smp.SmpError, "rank 2: other:0 float32 [3] dense"),
    fewer_variables: (smp.SmpError, "rank 0: 1 variables; rank 2: 2 variables"),
    no_gradient_on_one: (smp.SmpError, "rank 2: Variable:0 without a gradient"),
    other_compression: (smp.SmpError, "compressed alike"),
    variables_of_all: (smp.SmpError, "partition=1; rank 1: variable="),
    inside_a_step: (smp.SmpError, "accumulate() them"),
    averaged_before: LEAVE_OUT,
    scaled_around: LEAVE_OUT,
    legacy_scaled_around: LEAVE_OUT,
    allreduce_in_a_step: (smp.SmpError, "function=smp.allreduce"),
    no_sum_of_that: (TypeError, "dtype=string"),
    no_mean_of_integers: (TypeError, "op='sum'"),
    no_such_op: (ValueError, "op='max'"),
    no_such_group: (ValueError, "group='world'"),
    no_optimizer: (TypeError, "optimizer='sgd'"),
    no_compression: (TypeError, "compression='fp16'"),
    # It breaks the connection: the last one.
    allreduce_other_shapes: (tf.errors.DataLossError, "an allreduce"),
}


def refuse() -> dict[str, str]:
    with pytest.raises(smp.NotInitializedError, match="DistributedOptimizer"):
        smp.DistributedOptimizer(new.SGD(0.1))
    with pytest.raises(smp.NotInitializedError, match="allreduce"):
        smp.allreduce(1.0)
    smp.init({"partitions": 2})
    with pytest.raises(smp.ConfigError, match="dp_size=2; set horovod to true"):
        smp.DistributedOptimizer(new.SGD(0.1))
    smp.shutdown()
    start()
    found = {}
    for case, (kind, _) in REFUSED.items():
        begin = time.monotonic()
        with pytest.raises(kind) as caught:
            case()
        assert time.monotonic() - begin < SECONDS, case
        found[case.__name__] = re.sub(r"\s+", " ", str(caught.value))
    return found


@pytest.mark.timeout(120)
def test_bad_use_is_refused_on_every_rank() -> None:
    for rank, found in enumerate(run_ranks(4, refuse, timeout=110)):
        for case, (_, expected) in REFUSED.items():
            # A dp_group speaks of its own ranks: of 0 and 2, or 1 and 3.
            text = found[case.__name__]
            if "dp_group" in text:
                text = text.replace("rank 1", "rank 0").replace("rank 3", "rank 2")
            assert expected in text, (rank, case.__name__, text)


def one_replica() -> None:
    """Nothing is averaged, and Horovod is not needed."""
    smp.init({"partitions": 1})
    variable = tf.Variable([1.0])
    optimizer = smp.DistributedOptimizer(new.SGD(1.0))

    @tf.function
    def train() -> None:
        optimizer.apply_gradients([(tf.constant([2.0]), variable)])

    train()
    assert float(variable[0]) == -1.0
    types = {op.type for op in train.get_concrete_function().graph.get_operations()}
    assert not [each for each in types if "Horovod" in each or "Call" in each], types
    assert float(smp.allreduce(3.0)) == 3.0
    assert owners([variable]) == [0]


def test_one_replica_needs_nothing() -> None:
    run_ranks(1, one_replica)
