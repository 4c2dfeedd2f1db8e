"""Measuring a model: what is slow is seen, and nothing of the model changes."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.config import resolve
from smp_tf.frontend.variables import DeferredVariable
from smp_tf.plan.profile import Profile, group_atoms
from smp_tf.runtime import profiling
from smp_tf.runtime.step import Step
from tests.unit.one_process import session

layers = tf.keras.layers

ROUNDS = 400
WIDTH = 64


@pytest.fixture(autouse=True)
def no_session() -> None:
    smp.shutdown()


class Slow(layers.Layer):
    """A loop with as many rounds as a variable says, which no estimate knows."""

    def build(self, shape: Any) -> None:
        self.kernel = self.add_weight("kernel", [shape[-1], shape[-1]])
        rounds = tf.keras.initializers.Constant(ROUNDS)
        self.rounds = self.add_weight("rounds", [], tf.int32, rounds, trainable=False)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return tf.while_loop(
            lambda i, x: i < self.rounds,
            lambda i, x: (i + 1, tf.tanh(x @ self.kernel)),
            [0, x],
        )[1]


class Stack(smp.DistributedModel):
    def __init__(self, slow: int | None = None, depth: int = 6) -> None:
        super().__init__(name="stack")
        self.dense = [
            Slow(name="slow") if i == slow else layers.Dense(WIDTH, name=f"dense_{i}")
            for i in range(depth)
        ]

    def call(self, x: tf.Tensor) -> tf.Tensor:
        for layer in self.dense:
            x = layer(x)
        return x


class Noisy(smp.DistributedModel):
    """Dropout with and without a seed, and averages that a step writes."""

    def __init__(self) -> None:
        super().__init__(name="noisy")
        self.first = layers.Dense(16, name="first")
        self.norm = layers.BatchNormalization(name="norm")
        self.drop = layers.Dropout(0.5, seed=3, name="drop")
        self.also = layers.Dropout(0.25, name="also")
        self.last = layers.Dense(4, name="last")

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        x = self.norm(self.first(x), training=training)
        x = self.also(self.drop(x, training=training), training=training)
        return self.last(x)


BATCH = tf.constant(np.random.default_rng(5).standard_normal([32, WIDTH]), tf.float32)


def seconds_of(profile: Profile) -> dict[str, float]:
    return {row.layers[0]: row.both.measured for row in profile.rows}


def test_a_slow_layer_is_seen_and_the_partition_follows() -> None:
    model = Stack(slow=5)
    before = smp.plan(model, BATCH, partitions=2, memory_weight=0.0)
    profile = model.profile(BATCH)
    assert model.measured is profile
    found = seconds_of(profile)
    slow = found.pop("stack/slow")
    assert set(found) == {f"stack/dense_{i}" for i in range(5)}
    assert slow > 5 * max(found.values())
    assert all(row.backward.measured > 0 for row in profile.rows)
    assert all(isinstance(v, DeferredVariable) for v in model.variables)
    after = smp.plan(model, BATCH, partitions=2, memory_weight=0.0)
    last = after.plan.partition_of_atom.count(1)
    assert last == 1 < before.plan.partition_of_atom.count(1)
    assert after.plan.profile is profile and before.plan.profile is None
    assert "measured step by schedule" in smp.forecast_table(after)
    assert "stack/slow" in smp.profile_table(profile)
    # The real seconds of the whole step, which runs on two ranks at best.
    assert after.schedules[0].seconds > 0.5 * slow


def test_a_plan_measures_if_it_is_asked_to() -> None:
    model = Stack(slow=0)
    options = {"partitions": 2, "memory_weight": 0.0, "profile": True}
    found = smp.plan(model, (BATCH,), **options).plan
    assert model.measured is None and found.profile is not None
    assert found.partition_of_atom == (0, 1, 1, 1, 1, 1)
    assert not smp.is_initialized()

    @smp.step
    def forward(x: Any) -> Any:
        return model(x)

    found = smp.plan(forward, BATCH, **options).plan
    assert found.partition_of_atom == (0, 1, 1, 1, 1, 1)
    assert sum(row.backward.measured for row in found.profile.rows) == 0.0


def train(is_profiled: bool) -> list[Any]:
    """Losses and variables of a few steps."""
    tf.keras.utils.set_random_seed(11)
    model = Noisy()
    x = tf.constant(np.random.default_rng(1).standard_normal([8, 6]), tf.float32)
    if is_profiled:
        model.profile(x)
        assert all(
            isinstance(v, DeferredVariable)
            for v in model.variables
            if "kernel" in v.name
        )
        model.profile(x)  # again, for the fun of it

    @smp.step
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x, training=True) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    optimizer = tf.keras.optimizers.legacy.Adam(0.1)
    found = []
    for _ in range(3):
        gradients, loss = step(x)
        gradients = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        found.append(loss.reduce_mean().numpy())
    noise = tf.random.normal([3]).numpy(), np.random.rand(3)
    return [*found, *noise, *(v.numpy() for v in model.variables)]


def test_training_is_the_same_bit_for_bit() -> None:
    with session(microbatches=2):
        plain = train(is_profiled=False)
    with session(microbatches=2):
        profiled = train(is_profiled=True)
    assert len(plain) == len(profiled) > 10
    for one, other in zip(plain, profiled):
        np.testing.assert_array_equal(one, other)


def trace_of(step: Step, *args: Any, **config: Any) -> tuple[Any, Any]:
    resolved = resolve({"partitions": 1, "microbatches": 2, **config}, 1)
    arguments = step.read(args, {}, resolved)
    return step.trace(resolved, arguments), arguments


def test_nothing_that_a_step_writes_is_changed() -> None:
    model = Noisy()
    model.build([4, 6])
    model.set_weights([np.full(v.shape, 0.5, np.float32) for v in model.variables])
    metric, counter = tf.keras.metrics.Mean(), tf.Variable(5)
    generator = tf.random.Generator.from_seed(3)
    state = generator.state.numpy()

    @smp.step
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            noise = generator.normal([4, 4])
            loss = tf.reduce_mean((model(x, training=True) + noise) ** 2)
        counter.assign_add(1)
        metric.update_state(loss)
        return tape.gradient(loss, model.trainable_variables), metric.result()

    trace, arguments = trace_of(step, tf.ones([8, 6]))
    profile = profiling.measure(trace, arguments, 2)
    assert profile.forward_seconds > 0 and profile.backward_seconds > 0
    for variable in model.variables:
        np.testing.assert_array_equal(variable, np.full(variable.shape, 0.5))
    assert counter.numpy() == 5 and metric.result().numpy() == 0.0
    np.testing.assert_array_equal(generator.state, state)


def test_all_kinds_of_arguments() -> None:
    """Whole, along another axis, by itself; and a tape around it watches nothing."""

    class Pair:
        def __init__(self, left: Any, right: Any) -> None:
            self.left, self.right = left, right

        def smp_slice(self, num_mb: int, mb: int, axis: int) -> Any:
            parts = (
                tf.split(each, num_mb, axis)[mb] for each in (self.left, self.right)
            )
            return Pair(*parts)

    model = Stack(depth=3)

    @smp.step(non_split_inputs=["table"], input_split_axes={"turned": 1})
    def step(table: Any, turned: Any, pair: Any) -> Any:
        x = tf.transpose(turned) + pair.left + pair.right
        tf.debugging.assert_equal(tf.shape(x), [4, WIDTH])
        tf.debugging.assert_equal(tf.shape(table), [3])
        return model(x) + tf.reduce_sum(table)

    x = tf.ones([8, WIDTH])
    trace, arguments = trace_of(step, tf.ones([3]), tf.transpose(x), Pair(x, x))
    with tf.GradientTape():
        assert len(profiling.measure(trace, arguments, 2).rows) == 3


class Tokens(smp.DistributedModel):
    def __init__(self) -> None:
        super().__init__(name="tokens")
        self.embed = layers.Embedding(7, 8, name="embed")
        self.dense = layers.Dense(2, name="dense")

    def call(self, ids: tf.Tensor, scale: tf.Tensor) -> tf.Tensor:
        return self.dense(self.embed(ids) * scale)


def test_inside_a_function_inputs_are_made_up() -> None:
    model = Tokens()
    found = []

    @smp.step
    def step(ids: Any, scale: Any) -> Any:
        return model(ids, scale)

    @tf.function(autograph=False)
    def outer(ids: Any, scale: Any) -> Any:
        found.append(profiling.measure(*trace_of(step, ids, scale), 2))
        return ids

    ids, scale = tf.fill([4, 3], 99), tf.ones([4, 1, 8])  # no such token: not read
    outer(ids, scale)
    assert [row.layers for row in found[0].rows] == [
        ("tokens/embed",), ("tokens",), ("tokens/dense",),
    ]  # fmt: skip

    @smp.step(input_signature=[tf.TensorSpec([None, 3], tf.int32), None])
    def unknown(ids: Any, scale: Any) -> Any:
        return model(ids, scale)

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.int32)], autograph=False)
    def outer_unknown(ids: Any) -> Any:
        profiling.measure(*trace_of(unknown, ids, scale), 2)
        return ids

    with pytest.raises(
        smp.SmpError, match=r"argument='ids' shape=\(None, 3\); call st"
    ):
        outer_unknown(ids)
    # With real values nothing is unknown.
    trace, arguments = trace_of(unknown, tf.zeros([4, 3], tf.int32), scale)
    assert profiling.measure(trace, arguments, 2).forward_seconds > 0


def test_a_table_cannot_be_profiled() -> None:
    model = Stack(depth=2)
    table = tf.lookup.experimental.MutableHashTable(tf.int64, tf.float32, 0.0)

    @smp.step
    def step(x: Any) -> Any:
        y = model(x)
        table.insert(tf.constant([1], tf.int64), tf.reshape(y, [-1])[:1])
        return y

    with pytest.raises(smp.SmpError, match="else than variables.*LookupTableInsert"):
        profiling.measure(*trace_of(step, BATCH), 2)


def test_many_atoms_are_grouped(monkeypatch: pytest.MonkeyPatch) -> None:
    def few(graph: Any, atoms: Any) -> tuple[int, ...]:
        return group_atoms(graph, atoms, most=4)

    monkeypatch.setattr(profiling, "group_atoms", few)
    profile = Stack(depth=9).profile(BATCH)
    first = [row.forward.measured for row in profile.rows[:3]]
    assert len(profile.rows) == 9 and first == pytest.approx([first[0]] * 3)


def test_wrong_use() -> None:
    model = Stack()
    with session(microbatches=4):
        with pytest.raises(smp.MicrobatchError, match="microbatches=4"):
            model.profile(tf.zeros([6, WIDTH]))
        with pytest.raises(smp.SmpError, match="outside of every tf.function"):
            tf.function(lambda: model.profile(BATCH))()
        model.profile(BATCH)
        smp.step(lambda x: model(x))(BATCH)
        with pytest.raises(smp.SmpError, match="before the first step.*'stack'"):
            model.profile(BATCH)
    with pytest.raises(smp.ConfigError, match="`profile`: must be true or false"):
        smp.init({"profile": "yes"})
