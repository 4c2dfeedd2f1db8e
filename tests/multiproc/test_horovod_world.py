"""``horovod: true``: the dp_group is Horovod's world, and nobody hangs in it."""

import logging
import os
import re
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import horovod.tensorflow as hvd
import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.ranks import Outcome, run_ranks, start_ranks

SIZE, CULPRIT = 4, 1
STEPS, BATCH = 5, 16
LIMIT_SECONDS = 15.0  # for every other rank to end after the culprit failed
# Sums over microbatches and replicas are rounded in another order than in one process.
TOLERANCE = {"rtol": 1e-4, "atol": 1e-6}


def _variables() -> dict[str, str]:
    return {k: v for k, v in os.environ.items() if k.startswith("HOROVOD_")}


def _layers() -> list[tf.keras.layers.Layer]:
    sizes = (24, 20, 16, 4)
    return [tf.keras.layers.Dense(n, "tanh", name=f"dense{n}") for n in sizes]


def _batches() -> list[tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(5)
    return [
        (
            random.normal(size=(BATCH, 12)).astype("float32"),
            random.integers(0, 4, BATCH),
        )
        for _ in range(STEPS)
    ]


def _train(steps: int, before: Callable[[int], None] = lambda step: None) -> dict:
    """A script as SMP documents them; the local weights by name."""
    tf.keras.utils.set_random_seed(7)

    class Net(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__(name="net")
            self.stack = _layers()

        def call(self, x: tf.Tensor) -> tf.Tensor:
            for layer in self.stack:
                x = layer(x)
            return x

    model = Net()
    optimizer = tf.keras.optimizers.Adam(0.01)
    loss_of = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @smp.step
    def get_grads(images: tf.Tensor, labels: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(images: tf.Tensor, labels: tf.Tensor, first_batch: bool) -> Any:
        gradients, loss = get_grads(images, labels)
        gradients = [hvd.allreduce(g.accumulate()) for g in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        if first_batch:
            hvd.broadcast_variables(model.variables, root_rank=0)
            hvd.broadcast_variables(optimizer.variables(), root_rank=0)
        return loss.reduce_mean()

    batches = _batches()
    for step in range(steps):
        before(step)
        images, labels = (
            array[smp.dp_rank() :: smp.dp_size()] for array in batches[step % STEPS]
        )
        train_step(tf.constant(images), tf.constant(labels), step == 0)
    prefix = f"{model.name}/"
    return {v.name.removeprefix(prefix): v.numpy() for v in model.variables}


def _one_process() -> dict[str, np.ndarray]:
    """The same training by plain Keras, with the whole batch."""
    tf.keras.utils.set_random_seed(7)
    model, optimizer = tf.keras.Sequential(_layers()), tf.keras.optimizers.Adam(0.01)
    loss_of = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for images, labels in _batches():
        with tf.GradientTape() as tape:
            loss = loss_of(labels, model(images))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
    return {v.name: v.numpy() for v in model.variables}


def _world() -> dict[str, Any]:
    """What Horovod does in the world of this session."""
    hvd.init()  # nothing: smp.init() was there before
    mine = tf.constant([float(smp.rank())])
    variable = tf.Variable(mine)
    hvd.broadcast_variables([variable], root_rank=0)
    traced = tf.function(lambda value: hvd.allreduce(value, name="traced"))
    return {
        "group": smp.get_dp_group(),
        "smp": (smp.dp_rank(), smp.dp_size()),
        "hvd": (hvd.rank(), hvd.size()),
        "local": (hvd.local_rank(), hvd.local_size()),
        "cross": (hvd.cross_rank(), hvd.cross_size()),
        "eager": float(hvd.allreduce(mine, name="eager")[0]),
        "traced": float(traced(mine)[0]),
        "root": float(variable[0]),
    }


def _sessions() -> dict[str, Any]:
    """One session after the other in the same processes; the last one stays open."""
    launched = _variables()
    found: dict[str, Any] = {}

    hvd.init()
    with pytest.raises(smp.ConfigError) as caught:
        smp.init({"horovod": True})
    found["too early"] = str(caught.value)
    hvd.shutdown()

    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore
    logging.getLogger("smp_tf").addHandler(handler)
    smp.init({"partitions": 2})
    found["warnings"], found["initialized"] = list(warnings), hvd.is_initialized()
    smp.shutdown()

    for partitions, placement in ((4, "cluster"), (2, "cluster"), (2, "spread")):
        smp.init(
            {
                "partitions": partitions,
                "placement_strategy": placement,
                "microbatches": 2,
                "horovod": True,
            }
        )
        found[f"{partitions} {placement}"] = _world()
        if partitions == 2:
            found[f"weights {placement}"] = _train(STEPS)
            if placement == "spread":
                break
        smp.shutdown()
        assert _variables() == launched
        assert not hvd.is_initialized()
    return found


@pytest.fixture(scope="module")
def sessions() -> list[dict[str, Any]]:
    """What each of 4 ranks found; one launch for all tests of success."""
    return run_ranks(SIZE, _sessions, timeout=200)


@pytest.mark.timeout(260)
def test_hvd_init_before_smp_init_is_an_error_on_every_rank(
    sessions: list[dict[str, Any]],
) -> None:
    for found in sessions:
        assert found["too early"].startswith("`horovod`: hvd.init() was called before ")
        assert "hvd.size()=4" in found["too early"]


@pytest.mark.timeout(260)
def test_replicas_without_horovod_are_warned_of_once(
    sessions: list[dict[str, Any]],
) -> None:
    for rank, found in enumerate(sessions):
        assert not found["initialized"]
        told = [text for text in found["warnings"] if "2 replicas" in text]
        assert len(told) == (rank == 0), found["warnings"]


@pytest.mark.timeout(260)
@pytest.mark.parametrize(
    ("session", "groups"),
    [
        ("4 cluster", [[0], [1], [2], [3]]),
        ("2 cluster", [[0, 2], [1, 3]]),
        ("2 spread", [[0, 1], [2, 3]]),
    ],
)
def test_the_dp_group_is_the_world_of_horovod(
    sessions: list[dict[str, Any]], session: str, groups: list[list[int]]
) -> None:
    for rank, found in enumerate(sessions):
        (group,) = [group for group in groups if rank in group]
        place = (group.index(rank), len(group))
        mean = sum(group) / len(group)
        assert found[session] == {
            "group": group,
            "smp": place,
            "hvd": place,
            "local": place,
            "cross": (0, 1),
            "eager": mean,
            "traced": mean,
            "root": group[0],
        }


@pytest.mark.timeout(260)
@pytest.mark.parametrize("placement", ["cluster", "spread"])
def test_a_documented_script_ends_in_the_weights_of_one_process(
    sessions: list[dict[str, Any]], placement: str
) -> None:
    reference, seen = _one_process(), dict[str, np.ndarray]()
    for found in sessions:
        for name, value in found[f"weights {placement}"].items():
            np.testing.assert_allclose(value, reference[name], **TOLERANCE)
            np.testing.assert_array_equal(seen.setdefault(name, value), value)
    assert seen.keys() == reference.keys()


def _train_until_one_is_killed() -> None:
    smp.init({"partitions": 2, "microbatches": 2, "horovod": True})

    def before(step: int) -> None:
        if step == 10 and smp.rank() == CULPRIT:
            os.kill(os.getpid(), signal.SIGKILL)

    _train(100_000, before)


def _wait_for_one_that_ends(how: str) -> None:
    """Rank 0 waits for rank 1; in Horovod, rank 2 for rank 0 and rank 3 for rank 1."""
    smp.init({"partitions": 2, "horovod": True})
    variable = tf.Variable([1.0])
    hvd.broadcast_variables([variable], root_rank=0)
    smp.barrier()
    if smp.rank() == CULPRIT:
        time.sleep(1.0)
        if how == "exit":
            sys.exit(3)
        raise ValueError("boom")
    if smp.rank() == 0:
        smp.recv_from(CULPRIT, smp.WORLD_RANK)
    if smp.rank() == 2:
        hvd.broadcast_variables([variable], root_rank=0)
    hvd.allreduce(variable, name="waits")


@pytest.mark.timeout(150)
@pytest.mark.parametrize(
    ("function", "args", "code", "text"),
    [
        (_train_until_one_is_killed, (), -signal.SIGKILL, "rank 1 died"),
        (_wait_for_one_that_ends, ("raise",), 1, "rank 1 failed: ValueError: boom"),
        (_wait_for_one_that_ends, ("exit",), 3, "rank 1 left the job"),
    ],
    ids=["killed in training", "raises", "leaves"],
)
def test_every_rank_ends_and_names_the_one_that_failed(
    function: Callable[..., None], args: tuple[str, ...], code: int, text: str
) -> None:
    outcomes = start_ranks(SIZE, function, *args, timeout=100)
    culprit = outcomes[CULPRIT]
    assert culprit.exit_code == code, _shown(outcomes)
    for outcome in outcomes:
        if outcome is not culprit:
            assert not outcome.timed_out and outcome.exit_code == 1, _shown(outcomes)
            assert text in outcome.output, _shown(outcomes)
            assert outcome.ended - culprit.ended < LIMIT_SECONDS, _shown(outcomes)


TIMEOUT_S = 6.0


def _wait_for_one_that_does_not_come() -> None:
    smp.init({"partitions": 1, "horovod": True, "timeout_s": TIMEOUT_S})
    value = tf.ones([4])
    for _ in range(3):
        hvd.allreduce(value, name="known")  # from Horovod's cache the third time
    if smp.rank() == CULPRIT:
        time.sleep(100.0)
    began = time.monotonic()
    try:
        hvd.allreduce(value, name="known")
    finally:
        print(f"waited {time.monotonic() - began:.1f} s")


@pytest.mark.timeout(150)
def test_a_rank_that_does_not_come_fails_the_wait_within_timeout_s() -> None:
    outcomes = start_ranks(
        2, _wait_for_one_that_does_not_come, timeout=90, endless=(CULPRIT,)
    )
    waiting = outcomes[0]
    assert not waiting.timed_out and waiting.exit_code == 1, _shown(outcomes)
    waited = re.search(r"waited ([\d.]+) s", waiting.output)
    assert waited is not None, _shown(outcomes)
    seconds = float(waited[1])
    assert TIMEOUT_S <= seconds < TIMEOUT_S + LIMIT_SECONDS, _shown(outcomes)
    # Horovod itself says who, as it counts; we say which ranks these are.
    assert "Missing ranks:\n1!: [" in waiting.output, _shown(outcomes)
    assert "are the ranks 0, 1 of the job" in waiting.output, _shown(outcomes)


def _shown(outcomes: list[Outcome]) -> str:
    return "\n".join(map(str, outcomes))
