"""Sums over the ranks of a pipeline, and clipping by the norm of the whole model."""

import os
import re
import signal
import time
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.runtime.collectives import pipeline_sum
from tests.ranks import run_ranks, start_ranks

CULPRIT = 1
LIMIT_SECONDS = 10.0  # for every other rank to end after the culprit failed

# Added up in another order, these round otherwise.
PARTS = np.float32([[0.1, 1e8, -0.0], [1.1, -1e8, 0.0], [2.1, 0.3, 0.0]])


def _start() -> tuple[int, int]:
    """(rank, size) of a job with as many partitions."""
    size = int(os.environ["HOROVOD_SIZE"])
    smp.init({"partitions": size, "microbatches": 1})
    return smp.rank(), size


def _sums() -> list[bytes]:
    """The bits of sums: made eagerly, in a function, and in loops."""
    rank, size = _start()
    parts = PARTS[:size]
    want = parts[0].copy()
    for part in parts[1:]:
        want = want + part
    mine = tf.constant(parts[rank])
    found = []

    for _ in range(2):
        found.append(pipeline_sum(mine, "eager").numpy())

    @tf.function
    def once(x: tf.Tensor) -> tf.Tensor:
        pipeline_sum(x * 3.0, "nobody uses it")
        return pipeline_sum(x, "in a function")

    # Nothing but the sums themselves orders the turns of this loop.
    @tf.function
    def many(x: tf.Tensor, times: int) -> tf.Tensor:
        turns = tf.TensorArray(tf.float32, times)
        _, turns = tf.while_loop(
            lambda i, _: i < times,
            lambda i, kept: (
                i + 1,
                kept.write(i, pipeline_sum(x + tf.cast(i, tf.float32), "in a loop")),
            ),
            [0, turns],
            parallel_iterations=20,
        )
        return turns.stack()

    # Ranks need not trace equally often.
    if rank == 0:
        tf.function(once.python_function).get_concrete_function(mine)
    found += [once(mine).numpy() for _ in range(2)]
    for each in found:
        assert each.tobytes() == want.tobytes(), (each, want)
    turns = many(tf.constant([float(rank)]), 50).numpy()[:, 0]
    np.testing.assert_array_equal(turns, np.arange(50) * size + sum(range(size)))

    scalar = pipeline_sum(tf.constant(rank, tf.int64), "of another type")
    assert int(scalar) == sum(range(size))
    if size == 1:
        graph = once.get_concrete_function(mine).graph
        types = {operation.type for operation in graph.get_operations()}
        assert not [name for name in types if "Call" in name or "Smp" in name], types
    return [*(each.tobytes() for each in found), turns.tobytes()]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_all_ranks_get_the_same_bits_in_the_order_of_the_ranks(size: int) -> None:
    results = run_ranks(size, _sums)
    assert all(result == results[0] for result in results)


def _sums_beside_steps() -> np.ndarray:
    """A train step in a loop: pipeline, sum, pipeline, all in one function."""
    rank, size = _start()
    tf.keras.utils.set_random_seed(1)

    class Net(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__(name="net")
            self.stack = [tf.keras.layers.Dense(4) for _ in range(3)]

        def call(self, x: tf.Tensor) -> tf.Tensor:
            for layer in self.stack:
                x = layer(x)
            return x

    model = Net()

    @smp.step
    def gradients_of(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @smp.step
    def loss_of(x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(model(x) ** 2)

    @tf.function
    def train(x: tf.Tensor, times: int) -> tf.Tensor:
        norms = tf.TensorArray(tf.float32, times)
        for i in tf.range(times):
            gradients, _ = gradients_of(x)
            gradients = [gradient.accumulate() for gradient in gradients]
            clipped, norm = smp.clip_by_global_norm(gradients, 0.1)
            for gradient, variable in zip(clipped, model.trainable_variables):
                variable.assign_sub(gradient)
            after = pipeline_sum(norm, "unordered with the step that follows")
            row = tf.stack([norm, after / size, loss_of(x).reduce_mean()])
            norms = norms.write(i, row)
        return norms.stack()

    x = tf.ones([4, 4])
    return np.stack([train(x, 4).numpy() for _ in range(2)])


def test_sums_and_steps_in_one_loop() -> None:
    alone = run_ranks(1, _sums_beside_steps)[0]
    results = run_ranks(3, _sums_beside_steps)
    for result in results:
        np.testing.assert_array_equal(result, results[0])
    # Eight updates scaled by a norm that rounds otherwise: some units of float32.
    np.testing.assert_allclose(results[0], alone, rtol=1e-5)


GRADIENTS: dict[str, list[Any]] = {
    "below": [np.float32([0.1, 0.2]), None, np.float32([[0.05]]), np.float32([0.0])],
    "above": [np.float32([3.0, 4.0]), None, np.float32([[12.0]]), np.float32([0.1])],
    "nan": [np.float32([3.0, 4.0]), None, np.float32([[np.nan]]), np.float32([1.0])],
    "infinite": [np.float32([1.0, np.inf]), np.float32([1.0]), None, np.float32([2.0])],
    "zero": [np.zeros(2, "float32"), None, np.zeros([1, 1], "float32"), None],
    "float64": [np.array([3.0, 4.0]), None, np.array([[12.0]]), np.array([1.0])],
    "float16": [np.float16([3.0, 4.0]), None, np.float16([[2.0]]), np.float16([1.0])],
}


def _clips() -> list[bytes]:
    """Bits of the norms; every rank checks its own tensors against TensorFlow."""
    rank, size = _start()
    norms = []
    for name, values in GRADIENTS.items():
        whole = [None if each is None else tf.constant(each) for each in values]
        whole.append(_slices(whole[0]))
        # The last rank of several has no tensors at all.
        sharing = max(1, size - 1)
        mine = [i for i in range(len(whole)) if i % sharing == rank]
        expected, expected_norm = tf.clip_by_global_norm(whole, 1.0)
        clip = tf.function(lambda: smp.clip_by_global_norm([whole[i] for i in mine], 1))
        eager = smp.clip_by_global_norm([whole[i] for i in mine], 1.0)
        for clipped, norm in (eager, clip()):
            # Squares of few numbers, added up in another order: one unit, or two. A
            # rank without tensors has the norm in float32.
            types = [each.dtype.as_numpy_dtype for each in (norm, expected_norm)]
            unit = 2 * max(np.finfo(each).eps for each in types)
            np.testing.assert_allclose(norm, expected_norm, rtol=unit, err_msg=name)
            assert len(clipped) == len(mine)
            for i, each in zip(mine, clipped):
                _check_close(each, expected[i], 2 * unit, name)
            if expected_norm.dtype == tf.float32:
                norms.append(norm.numpy().tobytes())
    known = tf.constant(2.0)
    clipped, norm = smp.clip_by_global_norm([tf.constant([4.0])], 1.0, use_norm=known)
    assert float(clipped[0][0]) == 2.0 and float(norm) == 2.0
    return norms


def _slices(tensor: tf.Tensor) -> tf.IndexedSlices:
    """The same row twice: their values count, as in TensorFlow, not their sum."""
    return tf.IndexedSlices(
        tf.stack([tensor, tensor]), tf.constant([1, 1]), tf.constant([3, 2])
    )


def _check_close(found: Any, expected: Any, rtol: float, name: str) -> None:
    if expected is None:
        assert found is None
        return
    assert isinstance(found, tf.IndexedSlices) == isinstance(expected, tf.IndexedSlices)
    if isinstance(expected, tf.IndexedSlices):
        np.testing.assert_array_equal(found.indices, expected.indices)
        found, expected = found.values, expected.values
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=rtol, err_msg=name)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_clips_by_the_norm_of_all_ranks(size: int) -> None:
    results = run_ranks(size, _clips)
    assert all(result == results[0] for result in results)


def _clip_in_step() -> None:
    _start()
    model = tf.keras.Sequential([tf.keras.layers.Dense(2)])

    @smp.step
    def step(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x))
        gradients = tape.gradient(loss, model.trainable_variables)
        return smp.clip_by_global_norm(gradients, 1.0)

    with pytest.raises(smp.SmpError, match=r"smp\.step .*accumulate\(\)"):
        step(tf.ones([2, 2]))


def test_a_step_refuses_to_clip() -> None:
    with pytest.raises(smp.NotInitializedError, match="clip_by_global_norm"):
        smp.clip_by_global_norm([tf.constant([1.0])], 1.0)
    run_ranks(1, _clip_in_step)


def _die_between(how: str) -> None:
    rank, _ = _start()

    @tf.function
    def forever(x: tf.Tensor) -> tf.Tensor:
        for i in tf.range(1_000_000):
            if i == 100 and rank == CULPRIT:
                tf.numpy_function(_die, [], [])
            x = 0.5 * pipeline_sum(x, "the norm of everything")
        return x

    if how == "graph":
        forever(tf.constant([1.0]))
    for i in range(1_000_000):
        if i == 100 and rank == CULPRIT:
            _die()
        pipeline_sum(tf.constant([1.0]), "the norm of everything")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("how", ["graph", "eager"])
def test_the_others_name_a_rank_that_dies_in_the_middle_of_a_sum(how: str) -> None:
    outcomes = start_ranks(3, _die_between, how, timeout=60)
    shown = "\n".join(map(str, outcomes))
    culprit = outcomes[CULPRIT]
    assert culprit.exit_code == -signal.SIGKILL, shown
    for outcome in outcomes:
        if outcome.rank != CULPRIT:
            assert not outcome.timed_out and outcome.exit_code == 1, shown
            assert re.search(r"rank 1 died", outcome.error or ""), shown
            assert "the norm of everything" in (outcome.error or ""), shown
            assert outcome.ended - culprit.ended < LIMIT_SECONDS, shown


def _come_late() -> None:
    smp.init({"partitions": 2, "microbatches": 1, "timeout_s": 3})
    if smp.rank() == 0:
        text = "(?s)timeout_s=3.*norm from rank 1"
        with pytest.raises(tf.errors.DeadlineExceededError, match=text):
            pipeline_sum(tf.constant(1.0), "the norm")
        os._exit(0)
    time.sleep(60)


def test_a_rank_that_does_not_come_is_named_at_the_deadline() -> None:
    outcomes = start_ranks(2, _come_late, timeout=60, endless=[CULPRIT])
    assert outcomes[0].exit_code == 0, "\n".join(map(str, outcomes))
