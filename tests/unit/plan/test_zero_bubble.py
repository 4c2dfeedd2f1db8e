"""zero_bubble: rhythms, waves, and what becomes of them where they do not fit."""

import pytest

from smp_tf.plan.check import check
from smp_tf.plan.dry_run import dry_run
from smp_tf.plan.pipeline import Kind, Pipeline, Stage
from smp_tf.plan.rank_of_piece import rank_of_piece
from smp_tf.plan.schedules import build, wave
from smp_tf.plan.schedules.list_scheduling import PolicyStuck, list_schedule
from smp_tf.plan.schedules.steady import has_virtual_stages, steady
from smp_tf.plan.schedules.zero_bubble import zero_bubble
from tests.unit.plan.example_pipelines import (
    measured,
    ring,
    skips,
    split_backwards,
    uneven,
    with_message_seconds,
)


def v_of(p):
    return Pipeline.chain(p, 1.0, 1.0, 1.0, rank_of_piece(p, 2, "wave"))


def figures(pipeline, m, active):
    return check(zero_bubble(pipeline, m, active), pipeline, m, active)


def test_it_is_known_by_name():
    pipeline = measured(2)
    assert build("zero_bubble", pipeline, 4, 3) == zero_bubble(pipeline, 4, 3)


def test_a_rank_that_nobody_waits_for_does_not_hurry():
    """Rank 0 of a measured step makes all its forwards before its first backward."""
    first, second = zero_bubble(measured(2), 4, 4).to_text().splitlines()
    assert first == "0F0,0F1,0F2,0F3,4B0,4B1,4B2,4B3"
    assert second == "1F0,2I0,1F1,2I1,1F2,2I2,1F3,2I3,3W0,3W1,3W2,3W3"


@pytest.mark.parametrize("active", [1, 2, 3, 4, 7])
def test_more_microbatches_in_flight_never_cost_time(active):
    for pipeline in (
        Pipeline.chain(4, weight_seconds=1.0),
        measured(3),
        with_message_seconds(measured(3), 20.0),
    ):
        more = figures(pipeline, 12, active + 1)
        assert more.seconds <= figures(pipeline, 12, active).seconds * 1.001


@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 5, 16])
def test_it_is_never_slower_than_1f1b(p, m):
    """Of the same step: with each I and W as one B, and the same bound."""
    for seed in range(5):
        split = uneven(seed, p, True)
        stages = list(split.stages)
        whole = Pipeline.from_stages(
            [
                *stages[:p],
                *(
                    Stage(
                        Kind.B,
                        back.rank,
                        tuple(n if n < p else p + (n - p) // 2 for n in back.needs),
                        back.seconds + weight.seconds,
                    )
                    for back, weight in zip(stages[p::2], stages[p + 1 :: 2])
                ),
            ],
            p,
        )
        one_f_one_b = check(build("interleaved", whole, m, p), whole, m, p)
        assert figures(split, m, p).seconds <= one_f_one_b.seconds


@pytest.mark.parametrize(
    "pipeline",
    [ring(3), split_backwards(ring(3)), skips(3), split_backwards(skips(3)), v_of(3)],
)
def test_other_shapes_within_any_bound(pipeline):
    for m in (1, 2, 7):
        for active in (1, 2, 3, 9):
            report = figures(pipeline, m, active)
            assert max(report.peak_live) <= min(active, m)


# Waves.


def test_the_picture_of_a_wave_is_true():
    p, steps = 3, 20
    pipeline = v_of(p)
    policy = wave.wave(pipeline, 6, 2 * p)
    schedule = list_schedule(pipeline, 6, policy).schedule(pipeline)
    ends = dry_run(schedule, pipeline, lambda action: 1.0)
    for rank, actions in enumerate(schedule.ranks):
        cells = [" ."] * steps
        for action, end in zip(actions, ends[rank]):
            letter = action.kind.value
            # Going down are the first p forwards and the last p backwards.
            if action.stage < p or action.stage >= 4 * p:
                letter = letter.lower()
            if end <= steps:
                cells[int(end) - 1] = f"{letter}{action.mb}"
        assert f"    rank {rank}  {' '.join(cells)} ..\n" in wave.__doc__


def test_a_wave_within_a_smaller_bound():
    """It needs two microbatches for each rank; with fewer another order is had."""
    pipeline = v_of(4)
    with pytest.raises(PolicyStuck):
        list_schedule(pipeline, 16, wave.wave(pipeline, 16, 7))
    assert figures(pipeline, 16, 4).seconds == 16 * 6 + 3
    assert figures(pipeline, 16, 1).seconds == 16 * 17


def test_a_wave_may_have_whole_backwards():
    pipeline = Pipeline.chain(3, 1.0, 2.0, ranks=rank_of_piece(3, 2, "wave"))
    assert wave.wave(pipeline, 7, 6) is not None
    figures(pipeline, 7, 6)


@pytest.mark.parametrize(
    "pipeline",
    [
        Pipeline.chain(3, weight_seconds=1.0),
        Pipeline.chain(3, 1.0, 1.0, 1.0, rank_of_piece(3, 2, "loop")),
        Pipeline.chain(3, 1.0, 1.0, 1.0, rank_of_piece(3, 3, "wave")),
        Pipeline.from_stages([Stage(Kind.F, 0), Stage(Kind.F, 0)], 1),
        Pipeline((), 2),
        ring(2),
    ],
)
def test_what_is_no_wave(pipeline):
    assert wave.wave(pipeline, 4, 9) is None


# Rhythms.


def test_what_has_virtual_stages():
    assert has_virtual_stages(v_of(2))
    assert has_virtual_stages(Pipeline.chain(2, ranks=(0, 1, 0, 1)))
    assert not has_virtual_stages(Pipeline.chain(3))
    assert not has_virtual_stages(ring(3))
    assert not has_virtual_stages(Pipeline.chain(1, ranks=(0, 0)))


def test_how_far_ranks_are_ahead():
    assert steady(Pipeline.chain(4), 8, 9).ahead == (4, 3, 2, 1)
    assert steady(Pipeline.chain(4), 8, 2).ahead == (2, 2, 2, 1)
    looped = Pipeline.chain(4, ranks=rank_of_piece(4, 2))
    assert steady(looped, 8, 9).ahead == (11, 9, 7, 5)


def test_groups_of_microbatches():
    looped = Pipeline.chain(2, ranks=rank_of_piece(2, 2))
    policy = steady(looped, 3, 9)
    assert policy.forwards[0] == (0, 0, 2, 2, 0, 2)
    assert policy.backwards[0] == (5, 5, 7, 7, 5, 7)
