"""Two ranks plan with what the first of them measures, and train as without it."""

import logging
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf

import smp_tf as smp
from smp_tf.frontend.variables import DeferredVariable
from tests.ranks import ranks, run_ranks

ROUNDS, WIDTH, DEPTH = 400, 64, 6
MB = 2**20


class Slow(tf.keras.layers.Layer):
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
    """Layers with automatic names."""

    def __init__(self) -> None:
        super().__init__(name="stack")
        self.norm = tf.keras.layers.BatchNormalization()
        self.drop = tf.keras.layers.Dropout(0.2)
        self.dense = [tf.keras.layers.Dense(WIDTH) for _ in range(DEPTH - 1)]
        self.slow = Slow()

    def call(self, x: tf.Tensor) -> tf.Tensor:
        x = self.drop(self.norm(self.slow(x), training=True), training=True)
        for layer in self.dense:
            x = layer(x)
        return x


def train(**config: Any) -> dict[str, Any]:
    """Two steps; what this rank has afterwards."""
    is_profiling = config.pop("profiling_rank", None)
    smp.init({"microbatches": 2, "memory_weight": 0.0, **config})
    tf.keras.utils.set_random_seed(4)
    model = Stack()
    x = tf.constant(np.random.default_rng(2).standard_normal([8, WIDTH]), tf.float32)
    if is_profiling == smp.rank():
        assert len(model.profile(x).rows) > DEPTH
        assert all(
            isinstance(variable, DeferredVariable)
            for variable in model.variables
            if "kernel" in variable.name
        )

    @smp.step
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(x: Any) -> Any:
        gradients, loss = step(x)
        for gradient, variable in zip(gradients, model.trainable_variables):
            variable.assign_sub(0.1 * gradient.accumulate())
        return loss.reduce_mean()

    losses = [train_step(x).numpy() for _ in range(2)]
    plan = step.plan(x)
    small = step.plan(x[:4])  # of another signature: the same partition and profile
    assert small.partition_of_atom == plan.partition_of_atom
    assert (small.profile is None) == (plan.profile is None)
    everywhere = smp.allgather(
        {
            list(map(id, model.global_variables)).index(id(variable)): variable.numpy()
            for variable in model.variables
        },
        smp.WORLD,
    )
    found = {
        "losses": losses,
        "variables": {k: v for each in everywhere for k, v in each.items()},
        "chosen": plan.partition_of_atom,
        "schedule": str(plan.schedule),
        "seconds": plan.report.seconds,
        "rows": plan.profile and [row.forward for row in plan.profile.rows],
        "names": plan.profile and [row.layers for row in plan.profile.rows],
    }
    smp.shutdown()
    return found


def work() -> dict[str, Any]:
    if smp_rank() == 1:
        tf.keras.layers.Dense(1)  # automatic names count on from here
    return {
        "plain": train(),
        "key": train(profile=True),
        "call": train(profiling_rank=1),
    }


def smp_rank() -> int:
    """Known before ``smp.init``."""
    from smp_tf.launch import launch

    return launch().rank


def test_ranks_plan_with_one_profile_and_train_as_without() -> None:
    first, second = run_ranks(2, work, timeout=150)
    for how in ("plain", "key", "call"):
        mine, theirs = first[how], second[how]
        for key in ("losses", "chosen", "schedule", "seconds", "rows"):
            assert mine[key] == theirs[key], (how, key)
        assert mine["losses"] == first["plain"]["losses"]
        assert len(mine["variables"]) == 6 + 2 * (DEPTH - 1)
        for index, value in first["plain"]["variables"].items():
            np.testing.assert_array_equal(mine["variables"][index], value)
    assert first["plain"]["rows"] is None
    for how in ("key", "call"):
        assert first[how]["names"] != second[how]["names"]
        # The loop is first; it is so slow that it is left alone.
        assert first[how]["chosen"].count(0) < first["plain"]["chosen"].count(0)


@ranks(2, timeout=90)
def test_what_cannot_be_measured_is_estimated() -> None:
    records: list[logging.LogRecord] = []
    handler = logging.Handler()
    handler.emit = records.append  # type: ignore[method-assign]
    logging.getLogger("smp_tf").addHandler(handler)
    smp.init({"profile": True, "microbatches": 2})
    model = Stack()

    @smp.step(input_signature=[tf.TensorSpec([None, WIDTH], tf.float32)])
    def step(x: Any) -> Any:
        return model(x)

    @tf.function(input_signature=[tf.TensorSpec([None, WIDTH], tf.float32)])
    def evaluate(x: Any) -> Any:
        return step(x).merge()

    assert evaluate(tf.ones([4, WIDTH])).shape == [4, WIDTH]
    assert model.placement.profile is None
    warned = [record.getMessage() for record in records if record.levelno > 20]
    warned = [text for text in warned if text.startswith("profile: ")]
    assert len(warned) == (smp.rank() == 0), warned
    assert all("estimates" in text and "shape=(None, 64)" in text for text in warned)
    smp.shutdown()


class Wide(smp.DistributedModel):
    """16 layers of 16 MB."""

    def __init__(self) -> None:
        super().__init__(name="wide")
        self.dense = [tf.keras.layers.Dense(2048, use_bias=False) for _ in range(16)]

    def call(self, x: tf.Tensor) -> tf.Tensor:
        for layer in self.dense:
            x = layer(x)
        return x


def peak_bytes() -> int:
    for line in pathlib.Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmHWM")


@ranks(1, timeout=90)
def test_weights_exist_one_layer_at_a_time() -> None:
    small = Stack()
    small.profile(tf.ones([4, WIDTH]))  # what TensorFlow itself takes
    model = Wide()
    before = peak_bytes()
    model.profile(tf.ones([4, 2048]))
    assert sum(int(np.prod(v.shape)) * 4 for v in model.variables) == 256 * MB
    taken = peak_bytes() - before
    assert taken < 100 * MB, f"{taken / MB:.0f} MB"
