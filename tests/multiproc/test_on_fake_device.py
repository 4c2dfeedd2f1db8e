"""Sums, failures and mixed jobs of ranks with GPUs; the GPUs are fakes.

What is seen is all of smp_tf, from ``smp.init`` to its kernels for GPUs, see
tests/fake_device. Pipelines are in tests/conformance/test_on_fake_device.py.
"""

import pathlib
import signal
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.runtime import facts
from tests.data_parallel.test_training import LAYOUTS, compare
from tests.fake_device import library
from tests.multiproc.test_training_failures import _train
from tests.ranks import Outcome, run_ranks, start_ranks

pytestmark = pytest.mark.skipif(library.why_not() != "", reason=library.why_not())

CULPRIT = 1
LIMIT_SECONDS = 10.0  # for every other rank to end after one has failed


@pytest.fixture
def on_fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every rank has a GPU."""
    monkeypatch.setenv("TESTS_ON_GPU", "fake")


# --- what is told


def tell() -> Any:
    return facts.gather_job()


@pytest.mark.usefixtures("on_fake_device")
def test_info_tells_that_gpus_talk_by_nccl() -> None:
    job, _ = run_ranks(2, tell, timeout=50)
    assert [pair.gpus for pair in job.pairs] == ["NCCL"]
    assert all("GPU-0" in each.gpu for each in job.ranks)


# --- sums

DTYPES = ("float16", "bfloat16", "float32", "float64", "int64", "uint8", "int32")


def add_up() -> int:
    """Sums by NCCL."""
    smp.init({"partitions": 1, "horovod": True, "timeout_s": 30})
    assert tf.config.list_logical_devices("GPU")
    before = library.counts().operations
    for name in DTYPES:
        value = tf.cast(tf.range(5) + smp.rank(), name)
        total = smp.allreduce(value, smp.WORLD, op="sum")
        assert total.dtype == value.dtype
        expected = 3 * np.arange(5) + 3
        np.testing.assert_array_equal(tf.cast(total, tf.float64), expected, name)
    means = tf.function(lambda x: [smp.allreduce(x), smp.allreduce(2.0 * x)])
    for number in range(3):
        first, second = means(tf.constant(float(smp.rank() + number)))
        assert (float(first), float(second)) == (1.0 + number, 2.0 + 2 * number)
    with pytest.raises(tf.errors.DataLossError, match=r"rank 1: float32 \[3\]"):
        smp.allreduce(tf.ones([2 + smp.rank() % 2]))
    found = library.counts()
    assert (found.mistakes, found.mismatches) == (0, 0)
    return found.operations - before


@pytest.mark.usefixtures("on_fake_device")
def test_sums_go_by_nccl_but_for_what_is_on_the_host() -> None:
    of_dtypes, of_means = len(DTYPES) - 1, 6  # int32 is kept on the host
    tries = 2  # each group adds up something when it connects
    assert run_ranks(3, add_up, timeout=80) == [of_dtypes + of_means + tries] * 3


def train_replicas() -> None:
    for layout in LAYOUTS[:2]:
        compare("Adam", **layout)
    found = library.counts()
    assert found.operations > 0 and found.mistakes == 0


@pytest.mark.timeout(170)
@pytest.mark.usefixtures("on_fake_device")
def test_replicas_train_as_one_process() -> None:
    run_ranks(4, train_replicas, timeout=160)


# --- jobs with and without GPUs


class Mixed(smp.DistributedModel):
    """From partition to partition, and from the last one to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.stack = [tf.keras.layers.Dense(8, "tanh") for _ in range(7)]

    def call(self, x: tf.Tensor) -> tf.Tensor:
        for number, layer in enumerate(self.stack):
            with smp.partition(number // 2 % 3):
                x = layer(x)
        return x


def train_mixed(folder: str) -> tuple[int, list[float]]:
    """(messages by NCCL, the loss in each step); rank 1 has no GPU."""
    has_gpu = smp_rank() != CULPRIT
    if has_gpu:
        library.load(pathlib.Path(folder))
    smp.init({"partitions": 3, "microbatches": 2, "auto_partition": False})
    assert bool(tf.config.list_logical_devices("GPU")) == has_gpu
    tf.keras.utils.set_random_seed(1)
    model, optimizer = Mixed(), tf.keras.optimizers.SGD(0.5)

    @smp.step
    def forward_backward(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - 1.0) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    losses = []
    for _ in range(5):
        gradients, loss = forward_backward(tf.ones([4, 3]))
        means = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(means, model.trainable_variables))
        losses.append(float(loss.reduce_mean()))
    return (library.counts().operations if has_gpu else 0), losses


def smp_rank() -> int:
    from smp_tf.launch import launch

    return launch().rank


@pytest.mark.timeout(130)
def test_ranks_with_and_without_a_gpu() -> None:
    env = {"SMP_CONFIG": '{"share_gpu": true, "default_partition": 0}'}
    folder = str(library.build())
    found = run_ranks(3, train_mixed, folder, timeout=80, env=env)
    messages, losses = zip(*found)
    assert messages[0] == messages[2] > 0, "the same messages at both ends"
    assert losses[0] == losses[1] == losses[2] and losses[0][-1] < losses[0][0] / 2


# --- failures


def ended(how: str, env: dict[str, str] | None = None) -> tuple[list[Outcome], str]:
    outcomes = start_ranks(3, _train, how, timeout=90, env=env)
    return outcomes, "\n".join(map(str, outcomes))


@pytest.mark.timeout(110)
@pytest.mark.usefixtures("on_fake_device")
@pytest.mark.parametrize(
    ("how", "text"),
    [("raise", "rank 1 failed: ValueError: boom"), ("kill", "rank 1 died")],
)
def test_all_name_the_rank_that_failed(how: str, text: str) -> None:
    outcomes, shown = ended(how)
    for rank in (0, 2):
        outcome = outcomes[rank]
        assert not outcome.timed_out and outcome.exit_code == 1, shown
        assert text in (outcome.error or ""), shown
        assert outcome.ended - outcomes[CULPRIT].ended < LIMIT_SECONDS, shown
    assert outcomes[CULPRIT].exit_code == (-signal.SIGKILL if how == "kill" else 1)


@pytest.mark.timeout(110)
@pytest.mark.usefixtures("on_fake_device")
def test_all_name_the_connection_of_an_error_of_nccl() -> None:
    """A system error (2), as NCCL tells of a cable that is cut."""
    outcomes, shown = ended("never", {"FAKE_NCCL_ASYNC_ERROR": "2"})
    for outcome in outcomes:
        assert not outcome.timed_out and outcome.exit_code == 1, shown
        assert "a connection of NCCL failed" in (outcome.error or ""), shown
    first = min(outcome.ended for outcome in outcomes)
    assert max(outcome.ended for outcome in outcomes) - first < LIMIT_SECONDS, shown
