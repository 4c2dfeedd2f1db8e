"""Schedules: textbook orders, closed forms, limits, and golden files.

    python tests/unit/plan/test_schedules.py     writes the golden files anew
"""

import math
import sys
import textwrap
import time
from pathlib import Path

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Action, Kind, Pipeline, Schedule, Stage
from smp_tf.plan.check import check
from smp_tf.plan.comm import add_messages
from smp_tf.plan.dry_run import time_steps
from smp_tf.plan.schedules import NAMES, build
from smp_tf.plan.schedules.interleaved import interleaved, live_limits
from smp_tf.plan.schedules.list_scheduling import list_schedule
from smp_tf.plan.schedules.simple import simple
from tests.unit.plan.example_pipelines import (
    forward_only,
    random_pipeline,
    ring,
    towers_on_one_rank,
    two_towers,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
RANKS = range(1, 9)
MICROBATCHES = range(1, 17)
SEEDS = range(150)

# The textbook, written without any scheduler.


def textbook_gpipe(p, m):
    """All forwards, then all backwards."""
    return Schedule(
        tuple(
            tuple(Action(Kind.F, rank, mb) for mb in range(m))
            + tuple(Action(Kind.B, 2 * p - 1 - rank, mb) for mb in range(m))
            for rank in range(p)
        )
    )


def textbook_1f1b(p, m):
    """Warm-up of p - 1 - rank forwards, one forward one backward, the rest."""
    ranks = []
    for rank in range(p):
        forward = [Action(Kind.F, rank, mb) for mb in range(m)]
        backward = [Action(Kind.B, 2 * p - 1 - rank, mb) for mb in range(m)]
        warm_up = min(p - 1 - rank, m)
        actions = forward[:warm_up]
        for f, b in zip(forward[warm_up:], backward):
            actions += [f, b]
        ranks.append(tuple(actions + backward[m - warm_up:]))
    return Schedule(tuple(ranks))


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("costs", [(1, 1), (1, 2), (2, 1), (1, 3), (3, 4)])
def test_a_chain_gives_the_textbook(p, costs):
    for m in MICROBATCHES:
        pipeline = Pipeline.chain(p, *costs)
        assert interleaved(pipeline, m, p + 2) == textbook_1f1b(p, m)
        assert simple(pipeline, m) == textbook_gpipe(p, m)


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("costs", [(1.0, 1.0), (1.0, 2.0)])
def test_closed_forms_of_a_chain(p, costs):
    """Time, bubble and memory: Megatron-LM, arXiv 2104.04473, section 2.2."""
    pipeline = Pipeline.chain(p, *costs)
    for m in MICROBATCHES:
        one_f_one_b = check(interleaved(pipeline, m, p + 2), pipeline, m, p + 2)
        gpipe = check(simple(pipeline, m), pipeline, m)
        for report in (one_f_one_b, gpipe):
            assert report.seconds == (m + p - 1) * sum(costs)
            assert math.isclose(report.bubble, (p - 1) / (m + p - 1), abs_tol=1e-12)
        assert one_f_one_b.peak_live == tuple(min(p - rank, m) for rank in range(p))
        assert gpipe.peak_live == (m,) * p


@pytest.mark.parametrize("active", [1, 2, 3, 4])
def test_active_microbatches_bound_a_chain(active):
    pipeline = Pipeline.chain(4)
    report = check(interleaved(pipeline, 8, active), pipeline, 8, active)
    assert report.peak_live == tuple(min(active, 4 - rank) for rank in range(4))


def test_one_active_microbatch_is_no_pipeline():
    pipeline = Pipeline.chain(3)
    assert check(interleaved(pipeline, 5, 1), pipeline, 5).seconds == 5 * 6


@pytest.mark.parametrize("name", NAMES)
def test_the_picture_in_the_documentation_is_true(name):
    pipeline = Pipeline.chain(3)
    schedule = build(name, pipeline, 4, 5)
    picture = schedule.grid(time_steps(schedule, pipeline))
    # The package has functions of the same names as its modules.
    module = sys.modules[f"smp_tf.plan.schedules.{name}"]
    assert textwrap.indent(picture, "    ") in module.__doc__


# Other shapes.


def test_ring():
    """Two visits of rank 0: the schedule goes on while the first visit is kept."""
    pipeline = ring(2)
    schedule = interleaved(pipeline, 4, 4)
    assert live_limits(pipeline, 4) == (3, 2, 1, 0, 0, 0)
    assert schedule.grid(time_steps(schedule, pipeline)).splitlines()[1:] == [
        "rank 0  0F0  0F1  2F0  3B0  2F1  5B0  3B1  0F2  5B1  2F2  3B2  0F3  5B2  "
        "2F3  3B3    .  5B3",
        "rank 1    .  1F0  1F1    .  4B0    .    .  4B1  1F2    .    .  4B2  1F3  "
        "  .    .  4B3    .",
    ]


@pytest.mark.parametrize("p", range(1, 6))
@pytest.mark.parametrize("head_seconds", [0.2, 1.0])
def test_rings_of_any_size(p, head_seconds):
    pipeline = ring(p, head_seconds)
    for m in MICROBATCHES:
        eager = check(interleaved(pipeline, m, p + 2), pipeline, m, p + 2)
        gpipe = check(simple(pipeline, m), pipeline, m)
        assert max(eager.peak_live) <= min(p + 1, m)
        assert gpipe.peak_live == (m,) * p


def test_a_ring_keeps_its_busiest_rank_busy():
    """Rank 0 has twice the work of the others and should hardly ever wait."""
    for p in (2, 3, 4):
        report = check(interleaved(ring(p), 16, p + 2), ring(p), 16)
        assert report.seconds <= 16 * 4 * 1.1 + 2 * p


def test_two_towers_run_side_by_side():
    pipeline = two_towers()
    for m in MICROBATCHES:
        report = check(interleaved(pipeline, m, 5), pipeline, m, 5)
        assert report.seconds == 2 * (m + 1)
        assert report.peak_live == (min(m, 2), min(m, 2), 1)


@pytest.mark.parametrize("active", [1, 2, 3])
def test_a_rank_as_a_whole_has_a_limit(active):
    """Two forward stages of a rank count together, not each for itself."""
    pipeline = towers_on_one_rank()
    report = check(interleaved(pipeline, 8, active), pipeline, 8, active)
    assert report.peak_live[0] == active


def test_stages_that_no_backward_needs_make_the_way_no_longer():
    """A metric on the way back to rank 0 must not cost memory on rank 1."""
    stages = [
        Stage(Kind.F, 0),
        Stage(Kind.F, 1, (0,)),
        Stage(Kind.B, 1, (1,)),
        Stage(Kind.B, 0, (0, 2)),
        Stage(Kind.F, 0, (1,)),
        Stage(Kind.F, 1, (4,)),
    ]
    assert live_limits(Pipeline.from_stages(stages, 2), 9) == (2, 1, 0, 0, 0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_forward_only_has_no_limit(name):
    pipeline = forward_only(4)
    schedule = build(name, pipeline, 8, 1)
    report = check(schedule, pipeline, 8, 1)
    assert (report.seconds, report.peak_live) == (8 + 3, (0, 0, 0, 0))


@pytest.mark.parametrize("name", NAMES)
def test_no_stage_at_all(name):
    assert build(name, Pipeline((), 2), 4, 4) == Schedule(((), ()))


# Any graph.


def order_by_stage(schedule):
    """Return stage -> its microbatches in order."""
    found = {}
    for actions in schedule.ranks:
        for action in actions:
            found.setdefault(action.stage, []).append(action.mb)
    return found


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", SEEDS)
def test_any_graph_is_complete_in_order_and_cannot_hang(name, seed):
    pipeline = random_pipeline(seed)
    m = 1 + seed % 11
    active = 1 + seed % 5
    schedule = build(name, pipeline, m, active)
    limit = active if name == "interleaved" else None
    bare = check(schedule, pipeline, m, limit)
    stages = range(len(pipeline.stages))
    assert order_by_stage(schedule) == {stage: [*range(m)] for stage in stages}

    lowered = add_messages(schedule, pipeline)
    full = check(lowered, pipeline, m, limit)
    assert full.messages == m * len(pipeline.messages)
    assert (full.seconds, full.peak_live) == (bare.seconds, bare.peak_live)
    assert Schedule.from_text(lowered.to_text()) == lowered
    assert build(name, pipeline, m, active) == schedule


@pytest.mark.parametrize("seed", SEEDS)
def test_live_microbatches_obey_the_limit_of_each_stage(seed):
    """Count by hand what each forward stage keeps at any time on its rank."""
    pipeline = random_pipeline(seed)
    m, active = 12, 1 + seed % 6
    limits = live_limits(pipeline, active)
    for actions in interleaved(pipeline, m, active).ranks:
        done = set()
        for action in actions:
            done.add((action.stage, action.mb))
            for stage, holders in enumerate(pipeline.holders):
                live = [
                    mb
                    for mb in range(m)
                    if (stage, mb) in done
                    and any((holder, mb) not in done for holder in holders)
                ]
                assert len(live) <= limits[stage]


@pytest.mark.parametrize("seed", SEEDS)
def test_simple_starts_no_backward_before_the_last_forward_of_its_rank(seed):
    for actions in simple(random_pipeline(seed), 5).ranks:
        kinds = [action.kind for action in actions]
        assert kinds == sorted(kinds, key=[Kind.F, Kind.B].index)


def test_a_large_pipeline_is_built_and_checked_in_seconds():
    pipeline = Pipeline.chain(16)
    started = time.process_time()
    for name in NAMES:
        schedule = add_messages(build(name, pipeline, 256, 18), pipeline)
        assert check(schedule, pipeline, 256).messages == 256 * 30
    assert time.process_time() - started < 10


# Errors.


@pytest.mark.parametrize("name", NAMES)
def test_numbers_below_one(name):
    with pytest.raises(ScheduleError, match="num_microbatches=0"):
        build(name, Pipeline.chain(2), 0, 4)
    with pytest.raises(ScheduleError, match="active_microbatches=0"):
        build("interleaved", Pipeline.chain(2), 4, 0)


def test_unknown_name():
    with pytest.raises(ScheduleError, match="pipeline='zigzag'; use one of"):
        build("zigzag", Pipeline.chain(2), 4, 4)


def test_a_policy_that_forbids_everything_is_reported():
    class Never:
        def priority(self, stage, mb):
            return (stage,)

        def may_start(self, stage, progress):
            return False

    pipeline = Pipeline((Stage(Kind.F, 0),), 1)
    with pytest.raises(ScheduleError, match=r"nothing start any more; .*stages=\[0\]"):
        list_schedule(pipeline, 2, Never())


# Golden files: with messages, as they run.

PIPELINES = {
    "chain2": Pipeline.chain(2),
    "chain3": Pipeline.chain(3, 1.0, 2.0),
    "chain4": Pipeline.chain(4),
    "ring2": ring(2),
    "ring3": ring(3, head_seconds=0.5),
    "towers": two_towers(),
}
CASES = [
    (name, shape, m) for name in NAMES for shape in PIPELINES for m in (2, 4)
] + [("interleaved", "chain4", 8)]


def golden(name, shape, m):
    """Return the path of a golden file and what should be in it."""
    pipeline = PIPELINES[shape]
    schedule = build(name, pipeline, m, pipeline.num_ranks + 2)
    return (
        GOLDEN / f"{name}_{shape}_m{m}.csv",
        add_messages(schedule, pipeline).to_text(),
    )


@pytest.mark.parametrize(("name", "shape", "m"), CASES)
def test_golden_files(name, shape, m):
    path, text = golden(name, shape, m)
    assert path.read_text() == text


def test_every_golden_file_is_compared():
    assert sorted(GOLDEN.glob("*.csv")) == sorted(golden(*case)[0] for case in CASES)


@pytest.mark.parametrize(("name", "shape", "m"), CASES)
def test_golden_files_pass_the_check(name, shape, m):
    text = golden(name, shape, m)[0].read_text()
    check(Schedule.from_text(text), PIPELINES[shape], m)


if __name__ == "__main__":
    for case in CASES:
        path, text = golden(*case)
        path.write_text(text)
