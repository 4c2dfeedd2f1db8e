"""Which gradients are added together, and after which piece."""

import pytest

from smp_tf.plan import sums
from smp_tf.plan.piece import split_segment
from tests.unit.plan.example_graphs import SQUARE, analyse, chain


@pytest.mark.parametrize(
    "sizes, groups",
    [
        ([], []),
        ([3, 3, 3], [(0, 1, 2)]),
        ([9, 1], [(0, 1)]),
        ([9, 2], [(0,), (1,)]),
        ([4, 25, 4, 4], [(0,), (1,), (2, 3)]),  # the second alone is over the limit
        ([0, 10, 0], [(0, 1, 2)]),
    ],
)
def test_groups_stay_under_the_limit(sizes, groups):
    assert sums.group_by_bytes(enumerate(sizes), 10) == groups


WEIGHT_BYTES = 4 * SQUARE[0] * SQUARE[1]


@pytest.mark.parametrize("per_piece", [1, 2, 8])
def test_each_gradient_is_added_after_the_piece_that_makes_it(monkeypatch, per_piece):
    """Eight gradients on two partitions, last layers first; two in each addition."""
    monkeypatch.setattr(sums, "ADD_BYTES", 2 * WEIGHT_BYTES)
    step = analyse(chain(8))
    plan = step.cut([0, 0, 0, 0, 1, 1, 1, 1])
    returns = step.graph.returns
    summed = frozenset(range(1, 9))  # 0 is the loss
    sizes = {returns[position]: WEIGHT_BYTES for position in summed}
    for partition in range(2):
        pieces = [
            piece
            for segment in plan.segments
            if segment.partition == partition
            for piece in split_segment(
                step.graph, segment, sizes, per_piece * WEIGHT_BYTES
            )
        ]
        found = sums.group_sums(step.graph, plan, partition, pieces, summed)
        groups = [each for by_piece in found.values() for each in sum(by_piece, [])]
        mine = sorted(sum(groups, ()))
        assert mine == ([5, 6, 7, 8] if partition == 0 else [1, 2, 3, 4])
        for stage, groups in found.items():
            of_stage = [piece for piece in pieces if piece.stage == stage]
            for piece, group in zip(of_stage, groups, strict=True):
                positions = [p for each in group for p in each]
                assert {returns[p] for p in positions} <= set(piece.outputs)
                assert all(len(each) <= 2 for each in group)
