"""From steps to trace files and figures in one process; the recorder is a stand-in."""

import dataclasses
import logging
import sys
import time
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.errors import ConfigError, SmpError, TransportError
from smp_tf.report.timeline.file import read_trace
from smp_tf.report.timeline.run import BEGIN, END
from smp_tf.runtime import stats, timeline, timeline_steps
from tests.unit.runtime.linear import Linear, rows


class Event(NamedTuple):
    program: int
    event: int
    run: int
    start_ns: int
    end_ns: int
    bytes: int = 0


class Recorder(types.ModuleType):
    """``transport.events``, which is told what ran."""

    def __init__(self) -> None:
        super().__init__("smp_tf.transport.events")
        self.runs: list[list[Event]] = []
        self.newest: list[Event] = []
        self.max_events = self.count = 0
        self.error: Exception | None = None

    def ran(self, number: int) -> None:
        """All calls of a step, 1 ms each."""
        step = timeline_steps.find(number)
        assert step is not None
        self.count += 1
        start = time.monotonic_ns()
        events = [Event(number, BEGIN, self.count, start, start)]
        for index, _ in enumerate(step.labels):
            begin = start + index * 1_100_000
            events.append(Event(number, index, self.count, begin, begin + 1_000_000))
        end = start + len(step.labels) * 1_100_000
        self.newest = [*events, Event(number, END, self.count, end, end)]
        if self.max_events:
            self.runs.append(self.newest)

    def last(self) -> list[Event]:
        if self.error is not None:
            raise self.error
        return self.newest

    def take(self) -> list[Event]:
        runs, self.runs = self.runs, []
        return [event for run in runs for event in run]

    def keep(self, max_events: int) -> None:
        if self.error is not None:
            raise self.error
        self.max_events, self.runs = max_events, []

    def dropped(self) -> int:
        return 0


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    import smp_tf.transport

    stand_in = Recorder()
    monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    monkeypatch.setattr(smp_tf.transport, "events", stand_in, raising=False)
    smp.shutdown()
    yield stand_in
    smp.shutdown()


def trained(function: Callable[..., Any] | None = None) -> Any:
    """A step, built; and the number that the recorder knows it by."""
    model = Linear()

    @smp.step
    def train(x: tf.Tensor) -> tf.Tensor:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x))
        return tape.gradient(loss, model.trainable_variables)

    before = set(timeline_steps._built)
    train(rows(4))
    (number,) = set(timeline_steps._built) - before
    return number


def heads(folder: Path) -> list[Any]:
    return list(read_trace(folder / "rank_0.trace.json").heads)


def test_a_training_is_written_while_it_runs_and_at_its_end(
    tmp_path: Path, recorder: Recorder
) -> None:
    smp.init({"microbatches": 2, "trace_dir": str(tmp_path)})
    number = trained()
    recorder.runs = []  # none of what the true kernels did
    recorder.ran(number)
    deadline = time.monotonic() + 10
    while not heads(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert len(heads(tmp_path)) == 1
    recorder.ran(number)
    smp.shutdown()
    assert recorder.max_events == 0
    trace = read_trace(tmp_path / "rank_0.trace.json")
    (step,) = trace.steps.values()
    assert (step.name, step.num_microbatches, step.number) == ("train", 2, 0)
    assert len(trace.heads) == 2
    for head in trace.heads:
        actions = [span.action for span in trace.load(head).calls]
        assert actions == [call.action for call in step.calls[0]]
    # Another session of the process begins anew.
    smp.init({"trace_dir": str(tmp_path)})
    recorder.ran(trained())
    smp.shutdown()
    assert len(heads(tmp_path)) == 1


def test_nothing_is_kept_unless_somebody_asks(recorder: Recorder) -> None:
    smp.init()
    trained()
    assert recorder.max_events == 0 and timeline._recorder is None


def test_a_callback_records_the_batches_it_was_told(
    tmp_path: Path, recorder: Recorder
) -> None:
    smp.init({"microbatches": 2})
    number = trained()
    callback = smp.callbacks.TimelineCallback(tmp_path / "a", steps=[1, 3])
    again = smp.callbacks.TimelineCallback(tmp_path / "b", steps=2)
    for epoch in range(2):
        for batch in range(3):
            for each in (callback, again):
                each.on_train_batch_begin(batch)
            recorder.ran(number)
            for each in (callback, again):
                each.on_train_batch_end(batch)
    smp.shutdown()
    assert [head.run for head in heads(tmp_path / "a")] == [2, 4]
    assert [head.run for head in heads(tmp_path / "b")] == [3]


def test_a_callback_may_share_the_folder_of_the_configuration(
    tmp_path: Path, recorder: Recorder
) -> None:
    smp.init({"trace_dir": str(tmp_path)})
    number = trained()
    callback = smp.callbacks.TimelineCallback(tmp_path, steps=1)
    for batch in range(3):
        callback.on_train_batch_begin(batch)
        recorder.ran(number)
        callback.on_train_batch_end(batch)
    smp.shutdown()
    assert [head.run for head in heads(tmp_path)] == [1, 2, 3]


def test_a_broken_recorder_stops_nobody(
    tmp_path: Path,
    recorder: Recorder,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    smp.init({"trace_dir": str(tmp_path)})
    wrong = Event(trained(), 999, 1, 0, 0)
    monkeypatch.setattr(recorder, "take", lambda: [wrong])
    smp.shutdown()
    assert caplog.text.count("rank 0: the timeline ends here") == 1
    assert heads(tmp_path) == []


def test_a_callback_works_in_fit(tmp_path: Path, recorder: Recorder) -> None:
    smp.init()
    number = trained()
    model = tf.keras.Sequential([tf.keras.layers.Dense(1, input_shape=(2,))])
    model.compile("sgd", "mse")
    run = tf.keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: recorder.ran(number)
    )
    record = smp.callbacks.TimelineCallback(tmp_path, range(1, 3))
    data = tf.zeros([8, 2]), tf.zeros([8, 1])
    model.fit(*data, batch_size=2, epochs=1, verbose=0, callbacks=[record, run])
    smp.shutdown()
    assert [head.run for head in heads(tmp_path)] == [2, 3]


@pytest.mark.parametrize("steps", [[], -1, "all", [1.5]])
def test_batches_are_numbers(steps: Any) -> None:
    with pytest.raises(ConfigError, match="`steps` must be a number of a batch"):
        smp.callbacks.TimelineCallback("trace", steps)


def test_callbacks_need_a_session() -> None:
    callback = smp.callbacks.TimelineCallback("trace", 0)
    with pytest.raises(smp.NotInitializedError, match="TimelineCallback"):
        callback.on_train_batch_begin(0)


def test_without_kernels_training_goes_on(
    tmp_path: Path, recorder: Recorder, caplog: pytest.LogCaptureFixture
) -> None:
    recorder.error = TransportError("the kernels are not built")
    caplog.set_level(logging.WARNING, "smp_tf")
    smp.init({"trace_dir": str(tmp_path)})
    trained()
    with pytest.raises(SmpError, match="rank 0: the kernels are not built"):
        smp.last_step_stats()
    smp.shutdown()
    told = [record.getMessage() for record in caplog.records]
    assert told == ["rank 0: no timeline is recorded: the kernels are not built"]


def test_figures_of_the_last_step(recorder: Recorder) -> None:
    with pytest.raises(smp.NotInitializedError, match="last_step_stats"):
        smp.last_step_stats()
    smp.init({"microbatches": 2})
    with pytest.raises(SmpError, match="rank 0: no step has run since smp.init"):
        smp.last_step_stats()
    number = trained()
    recorder.ran(number)
    found = smp.last_step_stats()
    calls = len(timeline_steps._built[number].labels)
    assert (found.name, len(found.ranks)) == ("train", 1)
    assert found.busy_seconds == pytest.approx(calls * 1e-3)
    assert found.seconds == pytest.approx(calls * 1.1e-3)
    assert found.bubble == pytest.approx(1 / 11)
    assert (found.bytes_sent, found.predicted_bubble) == (0, 0.0)
    assert "step=train run=1: " in str(found)
    smp.shutdown()
    smp.init()  # the last step of an old session is none of this one
    with pytest.raises(SmpError, match="no step has run"):
        smp.last_step_stats()


def test_figures_of_different_runs_are_refused(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    smp.init()
    recorder.ran(trained())
    mine = stats._mine()
    assert not isinstance(mine, str)

    def gather(*others: Any) -> None:
        messages = types.SimpleNamespace(allgather=lambda obj, group: [obj, *others])
        current = types.SimpleNamespace(messages=messages)
        monkeypatch.setattr(stats.session, "current", lambda name: current)
        monkeypatch.setattr(stats, "_mine", lambda: mine)
        monkeypatch.setattr(stats.session, "get_mp_group", lambda: [2, 3])

    gather(dataclasses.replace(mine, run=9, name="evaluate"))
    text = "rank 2 last ran step=train run=1, rank 3 step=evaluate run=9"
    with pytest.raises(SmpError, match=text):
        smp.last_step_stats()
    gather("no step has run since smp.init()")
    with pytest.raises(SmpError, match="rank 3: no step has run"):
        smp.last_step_stats()


def test_calls_that_were_not_recorded_are_no_zero(recorder: Recorder) -> None:
    smp.init()
    recorder.ran(trained())
    recorder.newest = [recorder.newest[0], recorder.newest[-1]]
    with pytest.raises(SmpError, match="not recorded; on GPUs it cannot be yet"):
        smp.last_step_stats()
