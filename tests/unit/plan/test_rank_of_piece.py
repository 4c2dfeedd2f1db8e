"""Placements of the pieces of a model."""

import pytest

from smp_tf.errors import ScheduleError
from smp_tf.plan.rank_of_piece import PLACEMENTS, rank_of_piece


def test_loop():
    assert rank_of_piece(3, 2) == (0, 1, 2, 0, 1, 2)
    assert rank_of_piece(2, 3, "loop") == (0, 1, 0, 1, 0, 1)


def test_wave():
    assert rank_of_piece(3, 2, "wave") == (0, 1, 2, 2, 1, 0)
    assert rank_of_piece(2, 3, "wave") == (0, 1, 1, 0, 0, 1)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_every_rank_has_as_many(placement):
    for num_ranks in (1, 2, 5):
        for virtual_stages in (1, 2, 4):
            found = rank_of_piece(num_ranks, virtual_stages, placement)
            assert sorted(found) == sorted([*range(num_ranks)] * virtual_stages)
            assert found[:num_ranks] == tuple(range(num_ranks))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 1), "num_ranks=0, virtual_stages=1"),
        ((2, 0), "num_ranks=2, virtual_stages=0"),
        ((2, 2, "ring"), "placement='ring'; use one of"),
    ],
)
def test_errors(arguments, message):
    with pytest.raises(ScheduleError, match=message):
        rank_of_piece(*arguments)
