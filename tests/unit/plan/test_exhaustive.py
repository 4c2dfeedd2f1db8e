"""Every schedule of a tiny step is within 5 % of the shortest schedule there is.

"There is" means: of the same pipeline, with no more microbatches in flight on any
rank; for `simple` also without a backward before the last forward of its rank, for
that is what the name means. The truth is `exhaustive.shortest`, which is held against
plain enumeration here.
"""

import itertools

import pytest

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Action, Schedule
from smp_tf.plan.check import check
from smp_tf.plan.pipeline import Kind, Pipeline
from smp_tf.plan.rank_of_piece import rank_of_piece
from smp_tf.plan.schedules import build
from tests.unit.plan.example_pipelines import (
    measured,
    random_pipeline_of_all_kinds,
    ring,
    skips,
    split_backwards,
    towers_on_one_rank,
    two_towers,
    uneven,
    with_message_seconds,
)
from tests.unit.plan.exhaustive import shortest

MOST = 1.05

PIPELINES = {"two towers": two_towers(), "towers on one rank": towers_on_one_rank()}
for ranks in (1, 2, 3):
    chain = Pipeline.chain(ranks, 1.0, 1.0, 1.0)
    PIPELINES |= {
        f"unit {ranks}": Pipeline.chain(ranks),
        f"one to two {ranks}": Pipeline.chain(ranks, 1.0, 2.0),
        f"unit split {ranks}": chain,
        f"unit split, slow messages {ranks}": with_message_seconds(chain, 0.5),
        f"measured {ranks}": measured(ranks),
        f"measured, slow messages {ranks}": with_message_seconds(measured(ranks), 20.0),
        f"measured, all split {ranks}": Pipeline.chain(ranks, 52.0, 109.0, 48.0),
        f"skips {ranks}": skips(ranks),
        f"skips split {ranks}": split_backwards(skips(ranks)),
    }
    for head_seconds in (1.0, 0.5, 0.2):
        tied = ring(ranks, head_seconds)
        PIPELINES[f"ring {ranks} {head_seconds}"] = tied
        PIPELINES[f"ring split {ranks} {head_seconds}"] = split_backwards(tied)
    for seed in range(6):
        PIPELINES[f"uneven {ranks} {seed}"] = uneven(seed, ranks, False)
        PIPELINES[f"uneven split {ranks} {seed}"] = uneven(seed, ranks, True)
for ranks, placement in itertools.product((2, 3), ("loop", "wave")):
    owners = rank_of_piece(ranks, 2, placement)
    PIPELINES |= {
        f"{placement} {ranks}": Pipeline.chain(ranks, 1.0, 2.0, ranks=owners),
        f"{placement} split {ranks}": Pipeline.chain(ranks, 1.0, 1.0, 1.0, owners),
    }


@pytest.mark.parametrize("shape", PIPELINES)
def test_no_schedule_is_much_shorter(shape):
    pipeline = PIPELINES[shape]
    p = pipeline.num_ranks
    cases = [("simple", 1)] + [
        (name, active)
        for name in ("interleaved", "zero_bubble")
        for active in sorted({1, 2, p, p + 1, 2 * p - 1, 4})
    ]
    for m, (name, active) in itertools.product((1, 2, 3, 4), cases):
        is_simple = name == "simple"
        found = build(name, pipeline, m, active)
        report = check(found, pipeline, m, None if is_simple else active)
        limits = {
            "simple": None,
            "interleaved": report.peak_live,
            "zero_bubble": [active] * p,
        }[name]
        below = report.seconds / MOST
        best = shortest(pipeline, m, limits, below, is_simple, most_nodes=20_000)
        assert best is None, (name, m, active, report, found.to_text())


@pytest.mark.parametrize(("active", "seconds"), [(3, 901.0), (4, 888.0)])
def test_what_a_measured_step_can_reach(active, seconds):
    pipeline = measured(2)
    report = check(build("zero_bubble", pipeline, 4, active), pipeline, 4, active)
    assert report.seconds == seconds
    assert shortest(pipeline, 4, [active] * 2) == seconds


# The truth itself.


def enumerate_shortest(pipeline, m, limit):
    """Try all orders on all ranks; ask the checker about each."""
    ranks = []
    for rank in range(pipeline.num_ranks):
        own = [i for i, stage in enumerate(pipeline.stages) if stage.rank == rank]
        orders = set(itertools.permutations([i for i in own for _ in range(m)]))
        ranks.append([numbered(pipeline, order) for order in sorted(orders)])
    best = None
    for actions in itertools.product(*ranks):
        try:
            found = check(Schedule(actions), pipeline, m, limit)
        except ScheduleError:
            continue
        best = found.seconds if best is None else min(best, found.seconds)
    return best


def numbered(pipeline, order):
    """Write the stages of one rank as actions."""
    actions, turn = [], {}
    for stage in order:
        mb = turn.get(stage, 0)
        turn[stage] = mb + 1
        actions.append(Action(pipeline.stages[stage].kind, stage, mb))
    return tuple(actions)


@pytest.mark.parametrize("limit", [1, 2])
def test_the_truth_about_two_ranks(limit):
    for pipeline in (
        Pipeline.chain(2, 1.0, 2.0),
        measured(2),
        with_message_seconds(measured(2), 30.0),
        uneven(3, 2, False),
    ):
        truth = enumerate_shortest(pipeline, 2, limit)
        assert shortest(pipeline, 2, [limit] * 2) == pytest.approx(truth)
        assert shortest(pipeline, 2, [limit] * 2, below=truth) is None


def has_few_orders(pipeline):
    ranks = [stage.rank for stage in pipeline.stages]
    return len(ranks) <= 7 and max(ranks.count(rank) for rank in ranks) <= 3


SMALL = [
    seed
    for seed in range(300)
    if has_few_orders(random_pipeline_of_all_kinds(seed, "interleaved"))
]


@pytest.mark.parametrize("seed", SMALL)
def test_the_truth_about_any_small_graph(seed):
    pipeline = random_pipeline_of_all_kinds(seed, "interleaved")
    truth = enumerate_shortest(pipeline, 2, 1 + seed % 2)
    assert shortest(pipeline, 2, [1 + seed % 2] * pipeline.num_ranks) == pytest.approx(
        truth
    )


def test_forwards_first_is_a_rule_of_its_own():
    """A ring could be faster if rank 0 did not have to wait with its backwards."""
    pipeline = ring(2, 0.5)
    assert shortest(pipeline, 2) == 6.0
    assert shortest(pipeline, 2, forwards_first=True) == 7.0
    found = build("simple", pipeline, 2, 1)
    assert check(found, pipeline, 2).seconds == 7.0
    for actions in found.ranks:
        kinds = [action.kind for action in actions]
        assert kinds == sorted(kinds, key=[Kind.F, Kind.B].index)
