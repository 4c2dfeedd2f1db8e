"""From the recorder's events to a run and its figures."""

import pytest

from smp_tf.plan import schedules
from smp_tf.plan.action import Action, Pipeline
from smp_tf.plan.graph import TensorSpec
from smp_tf.plan.program import Channel, Instruction, Operation, Program
from smp_tf.report.timeline.plan import PlannedStep, planned_step
from smp_tf.report.timeline.run import (
    BEGIN,
    END,
    RankRun,
    Span,
    labels_of,
    run_of_events,
    split_runs,
)
from smp_tf.report.timeline.stats import StepStats, in_flight, rank_stats
from tests.unit.plan.example_graphs import chain
from tests.unit.report.example_pages import planned
from tests.unit.report.timeline.example_timelines import Event, example_run

H = Channel(0, "h", 1, TensorSpec("float32", (2, 3)))
D = Channel(1, "d", 1, TensorSpec("float32", (2, 3)))
PROGRAM = Program(
    0,
    1,
    (
        Instruction(Operation.CALL, 0, 0),
        Instruction(Operation.SEND, 0, 0, H),
        Instruction(Operation.POST, 2, 0, D),
        Instruction(Operation.WAIT, 2, 0, D),
        Instruction(Operation.CALL, 3, 0),
    ),
)
LABELS = labels_of(PROGRAM, Pipeline.chain(2))
EVENTS = [
    Event(7, BEGIN, 3, 100, 100),
    Event(7, 0, 3, 110, 150),
    Event(7, 2, 3, 155, 156),  # a post
    Event(7, 1, 3, 151, 170, 24),
    Event(7, 3, 3, 160, 300, 24),
    Event(7, 4, 3, 301, 350),  # the first piece of a call, and the second
    Event(7, 4, 3, 360, 400),
    Event(7, END, 3, 420, 420),
]
RUN = RankRun(
    5,
    3,
    100,
    420,
    (Span(Action.from_text("0F0"), 110, 150), Span(Action.from_text("3B0"), 301, 400)),
    (Span(Action.from_text("2RECV_B0<1"), 160, 300, "d", 24),),
    (Span(Action.from_text("0SEND_F0>1"), 151, 170, "h", 24),),
)


def test_events_become_calls_waits_and_sends():
    assert run_of_events(5, EVENTS, LABELS) == RUN
    assert run_of_events(5, reversed(EVENTS), LABELS) == RUN


def test_runs_are_told_apart():
    later = [event._replace(run=4) for event in EVENTS]
    assert split_runs([*EVENTS, *later]) == [EVENTS, later]
    assert split_runs([]) == []


def test_a_run_moves_to_another_clock():
    moved = RUN.shifted(-50)
    assert (moved.start_ns, moved.end_ns, moved.calls[1].start_ns) == (50, 370, 251)
    assert moved.shifted(50) == RUN and RUN.shifted(0) is RUN


def test_figures_of_a_rank():
    stats = rank_stats(RUN, (4, 6), 0)
    assert (stats.rank, stats.pp_rank, stats.bytes_sent) == (4, 0, 24)
    assert stats.seconds == pytest.approx(320e-9)
    assert stats.busy_seconds == pytest.approx(139e-9)
    assert stats.waiting_seconds == {6: pytest.approx(140e-9)}
    assert stats.other_seconds == pytest.approx(41e-9)
    assert stats.busy_share == pytest.approx(139 / 320)
    assert stats.peak_bytes_in_flight == 24


def test_bytes_in_flight():
    action = Action.from_text("0SEND_F0>1")
    times = [(0, 10, 5), (4, 8, 7), (10, 12, 1)]
    spans = [Span(action, start, end, "h", size) for start, end, size in times]
    assert in_flight(spans) == [(0, 5), (4, 12), (8, 5), (10, 1), (12, 0)]
    assert in_flight([]) == []


def test_the_bubble_is_that_of_the_group():
    first = rank_stats(RUN, (4, 6), 0)
    second = rank_stats(RUN.shifted(10), (4, 6), 1)
    stats = StepStats("train", 3, (first, second), 0.25)
    assert stats.bubble == pytest.approx(1 - 2 * 139 / (2 * 320))
    assert stats.bytes_sent == 48 and stats.seconds == first.seconds
    nothing = StepStats("train", 3, (), 0.0)
    assert (nothing.seconds, nothing.busy_share, nothing.bytes_sent) == (0, 0, 0)


def test_figures_print_as_a_table():
    lines = str(example_run(ranks=3, microbatches=6).stats).splitlines()
    assert lines[0].startswith("step=train_step run=1: ")
    assert "bubble" in lines[0] and "(predicted 25.0%)" in lines[0]
    assert lines[1].split()[:4] == ["rank", "partition", "step", "busy"]
    assert [line.split()[0] for line in lines[2:]] == ["0", "1", "2"]
    assert "0: " in lines[3] and "2: " in lines[3]


@pytest.mark.parametrize("name", schedules.NAMES)
def test_a_prediction_is_the_checkers_dry_run(name):
    plan = planned(chain(4), 2, pipeline=name)
    step = planned_step(1, "train", plan)
    assert (step.seconds, step.bubble) == (plan.report.seconds, plan.report.bubble)
    assert max(c.end for calls in step.calls for c in calls) == step.seconds
    total = 2 * step.seconds
    assert 1 - step.busy_seconds / total == pytest.approx(step.bubble)
    for calls, actions in zip(step.calls, plan.schedule.ranks, strict=True):
        computed = [action for action in actions if action.kind.is_compute]
        assert [call.action for call in calls] == computed
    assert PlannedStep.from_json(step.to_json()) == step
