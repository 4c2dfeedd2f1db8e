"""Timelines of real trainings: what they say is true, and nobody pays for them."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import tensorflow as tf

import smp_tf as smp
from smp_tf.plan.action import Action
from smp_tf.report.timeline.file import read_trace
from smp_tf.report.timeline.folder import RecordedRun, read_folder
from smp_tf.report.timeline.merge import merged_text
from smp_tf.report.timeline.run import RankRun
from smp_tf.runtime import join, session
from tests.ranks import run_ranks, start_ranks

M = 4
STEPS = 6


def _train(
    folder: str | None, config: dict[str, Any], steps: int = STEPS, culprit: int = -1
) -> Any:
    """Train and evaluate; figures of the last training step and the evaluation."""
    smp.init({"microbatches": M, "trace_dir": folder, **config})
    tf.keras.utils.set_random_seed(1)

    class Net(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__(name="net")
            self.stack = [tf.keras.layers.Dense(256) for _ in range(4)]

        def call(self, x: tf.Tensor) -> tf.Tensor:
            for layer in self.stack:
                x = layer(x)
            return x

    model, optimizer = Net(), tf.keras.optimizers.SGD(1e-3)

    @smp.step
    def forward_backward(x: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @smp.step
    def evaluate(x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(model(x))

    @tf.function
    def train(x: tf.Tensor, count: tf.Tensor) -> tf.Tensor:
        loss = tf.constant(0.0)
        for _ in tf.range(count):  # in the graph
            gradients, losses = forward_backward(x)
            gradients = [gradient.accumulate() for gradient in gradients]
            optimizer.apply_gradients(zip(gradients, model.trainable_variables))
            loss = losses.reduce_mean()
        return loss

    x = tf.random.stateless_normal([64, 256], [1, 2])
    train(x, 1)
    train(x, steps - 1)
    if culprit == smp.rank():
        time.sleep(2)  # what was recorded is on disk
        os.kill(os.getpid(), signal.SIGKILL)
    trained = smp.last_step_stats()
    evaluate(x)
    return trained, smp.last_step_stats(), session.current("").clock


def _names(action: Action, rank: int) -> Action:
    """The send that a receive on ``rank`` waits for."""
    return Action(action.kind.send, action.stage, action.mb, rank)


def check_run(run: RecordedRun) -> None:
    """What every run must fulfil, of all ranks together."""
    sends = {
        (rank, span.action, span.tensor): span
        for rank, each in enumerate(run.ranks)
        for span in each.sends
    }
    received = 0
    for rank, each in enumerate(run.ranks):
        expected = [call.action for call in run.planned.calls[rank]]
        assert [span.action for span in each.calls] == expected
        busy = sum(span.seconds for span in each.calls)
        waited = sum(span.seconds for span in each.waits)
        assert 0 < busy and 0 <= waited and busy + waited <= each.seconds
        _check_inside(each)
        for wait in each.waits:
            assert wait.action.peer is not None
            key = wait.action.peer, _names(wait.action, rank), wait.tensor
            assert wait.end_ns >= sends[key].start_ns
            assert wait.bytes == sends[key].bytes > 0
            received += 1
    assert received == len(sends) > 0


def _check_inside(run: RankRun) -> None:
    ends = run.start_ns
    for span in sorted([*run.calls, *run.waits], key=lambda span: span.start_ns):
        assert ends <= span.start_ns <= span.end_ns <= run.end_ns
        ends = span.end_ns


def test_a_training_on_two_ranks(tmp_path: Path) -> None:
    results = run_ranks(2, _train, str(tmp_path), {}, timeout=90)
    folder = read_folder(tmp_path)
    for place in range(STEPS):
        check_run(folder.choose("forward_backward", place))
    assert folder.choose("forward_backward").count == STEPS
    evaluation = folder.choose("evaluate", 0)
    assert evaluation.count == 1
    for trace in folder.traces:
        json.loads(trace.path.read_text())
    arrows = json.loads("".join(merged_text(folder)))
    starts, ends = ([e["id"] for e in arrows if e["ph"] == ph] for ph in "sf")
    assert sorted(starts) == sorted(ends) and len(set(starts)) == len(starts) > 0
    (trained, evaluated, clock), other = results
    assert other == (trained, evaluated, clock)
    assert (clock.offset_ns, clock.error_ns) == (0, 0)
    last = folder.choose("forward_backward", STEPS - 1)
    assert last.stats == trained and evaluation.stats == evaluated
    assert trained.predicted_bubble == last.planned.bubble > 0
    assert 0 < trained.bubble < 1 and trained.bytes_sent > 0
    assert [list(each.waiting_seconds) for each in trained.ranks] == [[1], [0]]
    assert evaluated.name == "evaluate" and evaluated.run == trained.run + 1


def test_replicas_have_files_and_figures_of_their_own(tmp_path: Path) -> None:
    results = run_ranks(4, _train, str(tmp_path), {"partitions": 2}, timeout=110)
    groups = [[each.rank for each in trained.ranks] for trained, _, _ in results]
    assert groups == [[0, 1], [0, 1], [2, 3], [2, 3]]
    folder = read_folder(tmp_path)
    assert len(folder.replicas) == 2
    for replica in range(2):
        check_run(folder.choose("forward_backward", replica=replica))


def test_a_killed_rank_leaves_what_it_did(tmp_path: Path) -> None:
    outcomes = start_ranks(2, _train, str(tmp_path), {}, STEPS, 1, timeout=90)
    shown = "\n".join(map(str, outcomes))
    assert outcomes[1].exit_code == -signal.SIGKILL, shown
    assert outcomes[0].exit_code == 1 and "rank 1 died" in shown, shown
    folder = read_folder(tmp_path)
    assert folder.choose("forward_backward").count == STEPS
    text = (tmp_path / "rank_1.trace.json").read_text()
    assert not text.endswith("]\n") and json.loads(text.rstrip(",\n") + "]")
    assert read_trace(tmp_path / "rank_0.trace.json").text[-1] == "]"


def test_a_folder_that_cannot_be_written_stops_nobody() -> None:
    outcomes = start_ranks(2, _train, "/proc/smp_tf", {}, timeout=90)
    for rank, outcome in enumerate(outcomes):
        assert outcome.exit_code == 0, outcome
        told = [line for line in outcome.output.splitlines() if "/proc/smp_tf" in line]
        assert len(told) == 1, outcome
        assert f"rank {rank}: the trace cannot be written: " in told[0]


def _align() -> Any:
    """As on two hosts, with clocks that in truth are the same."""
    rank = os.environ["HOROVOD_RANK"]
    join.clock_name = lambda: f"host {rank}"  # type: ignore[assignment]
    smp.init()
    return session.current("").clock


def test_clocks_of_hosts_are_aligned() -> None:
    first, second = run_ranks(2, _align)
    assert (first.offset_ns, first.error_ns) == (0, 0)
    assert abs(second.offset_ns) <= second.error_ns < 50e6


def _callback(folder: str) -> list[int]:
    smp.init({"microbatches": M})
    model = smp_model()

    @smp.step
    def forward(x: tf.Tensor) -> tf.Tensor:
        return tf.reduce_mean(model(x))

    callback = smp.callbacks.TimelineCallback(folder, steps=[2, 4])
    runs = []
    for batch in range(6):
        callback.on_train_batch_begin(batch)
        forward(tf.ones([8, 16]))
        callback.on_train_batch_end(batch)
        runs.append(smp.last_step_stats().run)
    return [runs[2], runs[4]]


def smp_model() -> Any:
    class Net(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__(name="net")
            self.stack = [tf.keras.layers.Dense(16) for _ in range(2)]

        def call(self, x: tf.Tensor) -> tf.Tensor:
            for layer in self.stack:
                x = layer(x)
            return x

    return Net()


def test_a_callback_records_its_batches_on_every_rank(tmp_path: Path) -> None:
    expected = run_ranks(2, _callback, str(tmp_path))
    for rank in range(2):
        trace = read_trace(tmp_path / f"rank_{rank}.trace.json")
        assert [head.run for head in trace.heads] == expected[rank]
