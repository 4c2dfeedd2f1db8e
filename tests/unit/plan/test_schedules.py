"""Schedules: textbook orders, closed forms, limits, and golden files.

    python tests/unit/plan/test_schedules.py     writes the golden files anew
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Action, Kind, Pipeline, Schedule, Stage
from smp_tf.plan.check import check
from smp_tf.plan.comm import add_messages
from smp_tf.plan.dry_run import time_steps
from smp_tf.plan.rank_of_piece import rank_of_piece
from smp_tf.plan.schedules import NAMES, build
from smp_tf.plan.schedules.interleaved import BackwardFirst, interleaved
from smp_tf.plan.schedules.limits import (
    Limits,
    depth_limits,
    live_limits,
    round_trips,
)
from smp_tf.plan.schedules.list_scheduling import PolicyStuck, list_schedule
from smp_tf.plan.schedules.portfolio import best_schedule, least_seconds
from smp_tf.plan.schedules.simple import simple
from smp_tf.plan.schedules.steady import steady
from tests.unit.plan.example_pipelines import (
    forward_only,
    measured,
    random_pipeline,
    random_pipeline_of_all_kinds,
    ring,
    towers_on_one_rank,
    two_towers,
)

GOLDEN = Path(__file__).resolve().parents[2] / "golden"
RANKS = range(1, 9)
MICROBATCHES = range(1, 17)
SEEDS = range(100)
TWO = ("interleaved", "simple")

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


@pytest.mark.parametrize("active", [1, 2, 3, 4])
def test_active_microbatches_bound_a_chain(active):
    pipeline = Pipeline.chain(4)
    report = check(interleaved(pipeline, 8, active), pipeline, 8, active)
    assert report.peak_live == tuple(min(active, 4 - rank) for rank in range(4))


def test_one_active_microbatch_is_no_pipeline():
    pipeline = Pipeline.chain(3)
    assert check(interleaved(pipeline, 5, 1), pipeline, 5).seconds == 5 * 6


@pytest.mark.parametrize(
    ("name", "pipeline", "m", "active"),
    [
        ("simple", Pipeline.chain(3), 4, 5),
        ("interleaved", Pipeline.chain(3), 4, 5),
        ("interleaved", Pipeline.chain(2, ranks=rank_of_piece(2, 2)), 2, 4),
        ("zero_bubble", Pipeline.chain(3, weight_seconds=1.0), 4, 3),
    ],
)
def test_the_picture_in_the_documentation_is_true(name, pipeline, m, active):
    schedule = build(name, pipeline, m, active)
    picture = schedule.grid(time_steps(schedule, pipeline))
    # The package has functions of the same names as its modules.
    module = sys.modules[f"smp_tf.plan.schedules.{name}"]
    assert textwrap.indent(picture, "    ") in module.__doc__


# Other shapes.


def test_ring():
    """Two visits of rank 0, the busiest: it never waits until all is done."""
    pipeline = ring(2)
    assert live_limits(pipeline, 4) == (2, 1, 1, 0, 0, 0)
    assert depth_limits(pipeline, 4) == (3, 2, 1, 0, 0, 0)
    report = check(interleaved(pipeline, 4, 4), pipeline, 4, 4)
    assert (report.seconds, report.peak_live) == (16.0, (2, 2))


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
    greedy = BackwardFirst(pipeline, Limits(pipeline, active))
    assert list_schedule(pipeline, 8, greedy).peak_live[0] == active
    report = check(interleaved(pipeline, 8, active), pipeline, 8, active)
    assert report.peak_live[0] <= active


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
    for limits in (live_limits, depth_limits):
        assert limits(Pipeline.from_stages(stages, 2), 9) == (2, 1, 0, 0, 0, 0)


# Limits.


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("costs", [(1.0, 1.0), (1.0, 2.0), (0.1, 0.2), (0.7, 0.1)])
def test_littles_law_on_a_chain(p, costs):
    """Sums of tenths are no whole numbers; that must not cost a microbatch."""
    expected = tuple(p - rank for rank in range(p)) + (0,) * p
    assert live_limits(Pipeline.chain(p, *costs), 99) == expected


def test_messages_make_the_way_longer():
    chain = Pipeline.chain(3, 1.0, 2.0)
    assert round_trips(chain)[:3] == (9.0, 6.0, 3.0)
    slow = Pipeline.chain(3, 1.0, 2.0, message_seconds=0.5)
    assert round_trips(slow)[:3] == (11.0, 7.0, 3.0)
    assert live_limits(slow, 9)[:3] == (4, 3, 1)
    assert live_limits(slow, 3)[:3] == (3, 3, 1)


@pytest.mark.parametrize("p", range(2, 6))
@pytest.mark.parametrize("seconds", [0.5, 1.0])
def test_slow_messages_are_hidden_by_more_microbatches(p, seconds):
    """Ranks wait for the first message and behind the last one, as they must."""
    slow = Pipeline.chain(p, 1.0, 2.0, message_seconds=seconds)
    report = check(interleaved(slow, 32, 2 * p), slow, 32, 2 * p)
    assert report.seconds == 32 * 3 + (p - 1) * (3 + 2 * seconds)
    assert report.peak_live == tuple(2 * (p - rank) - 1 for rank in range(p))
    # As many as without messages do not do.
    tight = check(interleaved(slow, 32, p), slow, 32, p)
    assert tight.seconds > report.seconds + 5


def test_stages_that_take_no_time():
    assert live_limits(Pipeline.chain(2, 0.0, 0.0), 5)[:2] == (1, 1)
    only_messages = Pipeline.chain(2, 0.0, 0.0, message_seconds=1.0)
    assert live_limits(only_messages, 5)[:2] == (5, 1)
    assert check(interleaved(only_messages, 4, 5), only_messages, 4).seconds == 2.0


# Several policies.


def test_no_order_beats_least_seconds():
    assert least_seconds(Pipeline.chain(3, 1.0, 2.0), 4) == 18.0
    assert least_seconds(Pipeline.chain(3, 1.0, 2.0, message_seconds=0.5), 4) == 20.0
    assert least_seconds(Pipeline((), 2), 4) == 0.0
    for seed in SEEDS:
        pipeline = random_pipeline_of_all_kinds(seed)
        least = least_seconds(pipeline, 3)
        for name in NAMES:
            seconds = check(build(name, pipeline, 3, 2), pipeline, 3).seconds
            assert seconds >= least * (1 - 1e-9)


def test_a_policy_that_is_stuck_is_passed_over():
    """Megatron's rhythm needs more microbatches in flight than may be here."""
    pipeline = Pipeline.chain(3, ranks=rank_of_piece(3, 2))
    with pytest.raises(PolicyStuck):
        list_schedule(pipeline, 9, steady(pipeline, 9, 3))
    assert check(interleaved(pipeline, 9, 3), pipeline, 9, 3).peak_live == (3, 3, 3)


def test_a_forward_that_waits_for_a_backward_is_nothing_for_simple():
    stages = [Stage(Kind.F, 0, after=(1,)), Stage(Kind.B, 0, (0,))]
    pipeline = Pipeline.from_stages(stages, 1)
    with pytest.raises(PolicyStuck, match=r"stages=\[0, 1\], num_microbatches=2"):
        simple(pipeline, 2)
    assert interleaved(pipeline, 2, 2).to_text() == "0F0,1B0,0F1,1B1\n"


def test_all_policies_stuck():
    class Never:
        def priority(self, stage, mb):
            return (stage,)

        def may_start(self, stage, progress):
            return False

    pipeline = Pipeline((Stage(Kind.F, 0),), 1)
    with pytest.raises(PolicyStuck, match=r"nothing start any more; .*stages=\[0\]"):
        list_schedule(pipeline, 2, Never())
    with pytest.raises(PolicyStuck):
        best_schedule(pipeline, 2, [Never()])


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
@pytest.mark.parametrize("plain", [True, False])
@pytest.mark.parametrize("seed", SEEDS)
def test_any_graph_is_complete_in_order_and_cannot_hang(name, plain, seed):
    pipeline = (
        random_pipeline(seed) if plain else random_pipeline_of_all_kinds(seed, name)
    )
    m = 1 + seed % 11
    active = 1 + seed % 5
    schedule = build(name, pipeline, m, active)
    limit = None if name == "simple" else active
    bare = check(schedule, pipeline, m, limit)
    stages = range(len(pipeline.stages))
    assert order_by_stage(schedule) == {stage: [*range(m)] for stage in stages}

    lowered = add_messages(schedule, pipeline)
    full = check(lowered, pipeline, m, limit)
    assert full.messages == m * len(pipeline.messages)
    assert full.peak_live == bare.peak_live
    # What is only returned may still be on its way when all is computed.
    late = max([0.0, *(message.seconds for message in pipeline.messages)])
    assert bare.seconds <= full.seconds <= bare.seconds + late
    assert Schedule.from_text(lowered.to_text()) == lowered
    assert build(name, pipeline, m, active) == schedule


@pytest.mark.parametrize("name", NAMES)
@given(
    seed=st.integers(0, 10**6),
    m=st.integers(1, 20),
    active=st.integers(1, 8),
)
@settings(max_examples=60, deadline=None)
def test_any_graph_any_number(name, seed, m, active):
    pipeline = random_pipeline_of_all_kinds(seed, name)
    schedule = add_messages(build(name, pipeline, m, active), pipeline)
    check(schedule, pipeline, m, None if name == "simple" else active)


@pytest.mark.parametrize("make", [random_pipeline, random_pipeline_of_all_kinds])
@pytest.mark.parametrize("seed", SEEDS)
def test_live_microbatches_obey_the_limit_of_each_stage(make, seed):
    """Count by hand what each forward stage keeps at any time on its rank."""
    pipeline = make(seed)
    m, active = 12, 1 + seed % 6
    limits = live_limits(pipeline, active)
    policy = BackwardFirst(pipeline, Limits(pipeline, active, limits))
    for actions in list_schedule(pipeline, m, policy).schedule(pipeline).ranks:
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
    for actions in simple(random_pipeline_of_all_kinds(seed), 5).ranks:
        backward = [action.kind.is_backward for action in actions]
        assert backward == sorted(backward)


def test_the_order_does_not_depend_on_hashes():
    """Every rank must come to the same order, whatever PYTHONHASHSEED says."""
    code = (
        "from smp_tf.plan.schedules import NAMES, build\n"
        "from tests.unit.plan.example_pipelines import *\n"
        "for seed in range(12):\n"
        "    for name in NAMES:\n"
        "        pipeline = random_pipeline_of_all_kinds(seed, name)\n"
        "        print(build(name, pipeline, 5, 3).to_text())\n"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", code],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            cwd=GOLDEN.parents[1],
            check=True,
            capture_output=True,
        ).stdout
        for hash_seed in ("1", "2", "3")
    }
    assert len(found) == 1
    assert len(next(iter(found))) > 1000


# Errors.


@pytest.mark.parametrize("name", NAMES)
def test_numbers_below_one(name):
    with pytest.raises(ScheduleError, match="num_microbatches=0"):
        build(name, Pipeline.chain(2), 0, 4)
    with pytest.raises(ScheduleError, match="active_microbatches=0"):
        build("interleaved", Pipeline.chain(2), 4, 0)
    with pytest.raises(ScheduleError, match="active_microbatches=0"):
        build("zero_bubble", Pipeline.chain(2), 4, 0)


def test_unknown_name():
    with pytest.raises(ScheduleError, match="pipeline='zigzag'; use one of"):
        build("zigzag", Pipeline.chain(2), 4, 4)


# Golden files: with messages, as they run.

PIPELINES = {
    "chain2": Pipeline.chain(2),
    "chain3": Pipeline.chain(3, 1.0, 2.0),
    "chain4": Pipeline.chain(4),
    "ring2": ring(2),
    "ring3": ring(3, head_seconds=0.5),
    "towers": two_towers(),
    "loop2": Pipeline.chain(2, 1.0, 2.0, ranks=rank_of_piece(2, 2)),
    "loop4": Pipeline.chain(4, 1.0, 2.0, ranks=rank_of_piece(4, 2)),
    "split2": Pipeline.chain(2, weight_seconds=1.0),
    "split3": Pipeline.chain(3, weight_seconds=1.0),
    "split4": Pipeline.chain(4, weight_seconds=1.0),
    "measured2": measured(2),
    "wave2": Pipeline.chain(2, 1.0, 1.0, 1.0, rank_of_piece(2, 2, "wave")),
    "wave4": Pipeline.chain(4, 1.0, 1.0, 1.0, rank_of_piece(4, 2, "wave")),
}
WHOLE = ("chain2", "chain3", "chain4", "ring2", "ring3", "towers")
SPLIT = ("split2", "split3", "split4", "measured2", "wave2", "wave4")
CASES = [
    *((name, shape, m) for name in TWO for shape in WHOLE for m in (2, 4)),
    *(("interleaved", shape, m) for shape in ("loop2", "loop4") for m in (4, 8)),
    *(("zero_bubble", shape, m) for shape in SPLIT for m in (2, 4, 8)),
    ("interleaved", "chain4", 8),
]


def active_of(shape):
    """As many as the schedules of the literature need."""
    num_ranks = PIPELINES[shape].num_ranks
    if shape.startswith("split"):
        return num_ranks
    return 2 * num_ranks if shape[:4] in ("loop", "wave") else num_ranks + 2


def golden(name, shape, m):
    """Return the path of a golden file and what should be in it."""
    pipeline = PIPELINES[shape]
    schedule = build(name, pipeline, m, active_of(shape))
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
    limit = None if name == "simple" else active_of(shape)
    check(Schedule.from_text(text), PIPELINES[shape], m, limit)


# Messages and memory.


@pytest.mark.parametrize(
    ("message_seconds", "kept"),
    [(0.0, [3, 2, 1]), (0.01, [3, 2, 1]), (1.0, [5, 3, 1])],
)
def test_another_microbatch_is_kept_only_where_it_pays(message_seconds, kept):
    """Quick messages cost nothing worth its activations; slow ones are worth them."""
    pipeline = Pipeline.chain(3, message_seconds=message_seconds)
    schedule = build("interleaved", pipeline, 16, active_microbatches=5)
    assert list(check(schedule, pipeline, 16, 5).peak_live) == kept


if __name__ == "__main__":
    for case in CASES:
        path, text = golden(*case)
        path.write_text(text)
