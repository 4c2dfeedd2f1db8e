"""Time, idle share and memory of textbook pipelines, exactly.

Sources, and the symbols of them all: p ranks, m microbatches, v pieces a rank.

    GPipe         arXiv 1811.06965, section 2.3     (p - 1) / (m + p - 1)
    1F1B          arXiv 2104.04473, section 2.2     the same; p - i microbatches kept
    looped        arXiv 2104.04473, section 2.2     (p - 1) / (v m + p - 1)
    ZB-H1, ZB-H2  arXiv 2401.10241, table 2         see the tests
    ZB-V          arXiv 2401.10241, section 6       see the test

Megatron-LM divides the idle time by the ideal time and gives (p - 1) / (v m); here it
is divided by the whole time. Times are whole numbers, so that nothing is rounded but
the last quotient, and `==` means equal.
"""

import dataclasses

import pytest

from smp_tf.plan.check import check
from smp_tf.plan.pipeline import Pipeline
from smp_tf.plan.rank_of_piece import rank_of_piece
from smp_tf.plan.schedules import build

RANKS = (2, 4, 8, 16, 64)


def microbatches(p):
    """All that could be special, and for few ranks all there are up to 64."""
    found = {1, p - 1, p, p + 1, 2 * p - 1}
    if p <= 16:
        found |= {2, 3, 2 * p, 2 * p + 1, 3 * p + 2, 257, 1000, 1024}
    if p <= 4:
        found |= {*range(1, 65)}
    return sorted(found)


def report(name, pipeline, m, active):
    return check(
        build(name, pipeline, m, active),
        pipeline,
        m,
        None if name == "simple" else active,
    )


@pytest.mark.parametrize("p", RANKS)
@pytest.mark.parametrize("costs", [(1.0, 1.0), (1.0, 2.0)])
def test_gpipe_and_1f1b(p, costs):
    pipeline = Pipeline.chain(p, *costs)
    for m in microbatches(p):
        gpipe = report("simple", pipeline, m, p)
        one_f_one_b = report("interleaved", pipeline, m, p)
        for found in (gpipe, one_f_one_b):
            assert found.seconds == (m + p - 1) * sum(costs)
            assert found.bubble == (p - 1) / (m + p - 1)
        assert gpipe.peak_live == (m,) * p
        assert one_f_one_b.peak_live == tuple(min(p - rank, m) for rank in range(p))


@pytest.mark.parametrize(("p", "v"), [(p, v) for p in RANKS for v in (2, 4)])
@pytest.mark.parametrize("costs", [(1.0, 1.0), (1.0, 2.0)])
def test_looped_virtual_stages(p, v, costs):
    pipeline = Pipeline.chain(p, *costs, ranks=rank_of_piece(p, v))
    for m in (p, 2 * p, 3 * p, 7 * p) if p < 64 else (2 * p,):
        found = report("interleaved", pipeline, m, 2 * p)
        assert found.seconds == (v * m + p - 1) * sum(costs)
        assert found.bubble == (p - 1) / (v * m + p - 1)
        # Warm-up of Megatron-LM's schedule, and one more: section 2.2, and
        # get_num_warmup_microbatches in its pipeline_parallel/schedules.py.
        for rank, pieces in enumerate(found.peak_pieces):
            assert pieces <= (v - 1) * p + 2 * (p - rank) - 1
        assert found.peak_pieces[0] <= v * p + p - 1


@pytest.mark.parametrize("p", RANKS)
def test_zb_h1(p):
    """The time of 1F1B less 2 (p - 1), with the memory of 1F1B's first rank.

    No order takes less. The last rank has 3 m steps to do, and starts at step p - 1 at
    the earliest. Rank 0 can do no I before step 2 p - 1, for the first microbatch has
    to go through p F and p - 1 I; from then on it has m I and m W to do.
    """
    pipeline = Pipeline.chain(p, 1.0, 1.0, 1.0)
    for m in microbatches(p):
        found = report("zero_bubble", pipeline, m, p)
        assert found.seconds == max(3 * m + p - 1, 2 * m + 2 * p - 1)
        assert max(found.peak_live) == min(p, m)
        if m >= p:
            assert found.bubble == (p - 1) / (3 * m + p - 1)


@pytest.mark.parametrize("p", RANKS)
def test_zb_h2(p):
    """No rank waits between its first action and its last, if m >= 2 p - 1.

    Rank 0 has to fill 2 p - 1 steps with F until its first I; so many it must keep.
    """
    pipeline = Pipeline.chain(p, 1.0, 1.0, 1.0)
    for m in microbatches(p):
        found = report("zero_bubble", pipeline, m, 2 * p - 1)
        assert found.seconds == max(3 * m + p - 1, 2 * m + 2 * p - 1)
        assert max(found.peak_live) == min(2 * p - 1, m)
        if m >= 2 * p - 1:
            assert found.span == 3 * m
        else:
            assert found.span > 3 * m


@pytest.mark.parametrize("p", RANKS)
def test_zb_v(p):
    """No rank waits, as with ZB-H2, and it keeps p of the activations of a rank.

    In steps of half a rank's F there are 6 m of them; a live piece is half a rank's.
    """
    pipeline = Pipeline.chain(p, 1.0, 1.0, 1.0, ranks=rank_of_piece(p, 2, "wave"))
    for m in (2 * p - 1, 2 * p, 3 * p + 2) if p < 64 else (2 * p + 1,):
        found = report("zero_bubble", pipeline, m, 2 * p)
        assert found.span == 6 * m
        assert found.seconds == 6 * m + p - 1
        assert max(found.peak_pieces) == 2 * p


@pytest.mark.parametrize("name", ["simple", "interleaved"])
def test_a_thousand_microbatches_on_64_ranks(name):
    found = report(name, Pipeline.chain(64), 1024, 64)
    assert found.bubble == 63 / (1024 + 63)


def test_zero_bubble_with_a_thousand_microbatches_on_64_ranks():
    found = report("zero_bubble", Pipeline.chain(64, 1.0, 1.0, 1.0), 1024, 64)
    assert found.bubble == 63 / (3 * 1024 + 63)
    assert max(found.peak_live) == 64


# Gradients that leave before the rest of their backward.


@pytest.mark.parametrize("name", ["interleaved", "simple"])
@pytest.mark.parametrize("p", [2, 3, 4, 8])
@pytest.mark.parametrize("m", [1, 2, 3, 7, 16, 64])
def test_a_backward_that_sends_first_shortens_the_way_back(name, p, m):
    """A backward of 2 sends after 1: every hop back costs 1 and not 2, with the memory
    that it had. The time is m (F + B) + (p - 1) (F + B - W)."""
    chain = Pipeline.chain(p, 1.0, 2.0)
    early = dataclasses.replace(
        chain,
        messages=tuple(
            dataclasses.replace(
                each, seconds=-1.0 * chain.stages[each.stage].kind.is_backward
            )
            for each in chain.messages
        ),
    )
    report = check(build(name, early, m, p), early, m)
    assert report.seconds == 3 * m + 2 * (p - 1)
    assert report.peak_live == check(build(name, chain, m, p), chain, m).peak_live
