"""Why a layer is where it is, against figures that are computed here once more."""

import math

import pytest

from smp_tf.plan.explain import Reason, borders, figures
from smp_tf.plan.partition import SLACK, partition_problem
from tests.unit.plan.example_problems import chain_flows, problem, random_problem


def recomputed(given, chosen):
    """(load of the fullest rank in even shares, bytes cut, messages, most bytes)"""
    ranks = range(given.num_partitions)
    of_rank = [[a for a, p in enumerate(chosen) if p == rank] for rank in ranks]
    memory = [
        sum(
            given.static_bytes[a] + given.in_flight[rank] * given.activation_bytes[a]
            for a in of_rank[rank]
        )
        for rank in ranks
    ]
    mean = sum(given.in_flight) / len(ranks)
    all_bytes = sum(given.static_bytes) + mean * sum(given.activation_bytes)
    all_seconds = sum(given.seconds)
    loads = [
        given.memory_weight * memory[rank] / (all_bytes or 1)
        + (1 - given.memory_weight)
        * sum(given.seconds[a] for a in of_rank[rank])
        / (all_seconds or 1)
        for rank in ranks
    ]
    crossing = [
        (flow.size, rank)
        for flow in given.flows
        for rank in ranks
        if rank != chosen[flow.source]
        and any(chosen[reader] == rank for reader in flow.readers)
    ]
    cut = sum(size for size, _ in crossing)
    return max(loads) * len(ranks), cut, len(crossing), max(memory)


def moved(chosen, move):
    return [move.target if a in move.atoms else p for a, p in enumerate(chosen)]


def only(given, chosen):
    (border,) = borders(given, chosen)
    return border


def test_a_fuller_rank():
    given = problem([4, 4, 4, 4], 2, flows=chain_flows(10, 2, 10))
    border = only(given, [0, 0, 1, 1])
    assert (border.left, border.last.atoms, border.first.atoms) == (0, (1,), (2,))
    assert border.last.reason is border.first.reason is Reason.HEAVIER
    assert (border.last.before.fullest, border.last.after.fullest) == (1.0, 1.5)
    # Everywhere else more bytes would cross.
    assert border.earlier is border.later is None
    assert border.moves == (border.last, border.first)


def test_more_bytes():
    given = problem([8, 0, 8], 2, flows=chain_flows(5, 9))
    border = only(given, [0, 1, 1])
    assert border.first.reason is Reason.CUTS_MORE
    assert (border.first.before.cut_bytes, border.first.after.cut_bytes) == (5, 9)
    assert border.last.reason is Reason.EMPTY


def test_more_messages():
    flows = [(0, (1,), 6), (1, (2,), 4), (1, (2,), 2)]
    border = only(problem([8, 0, 8], 2, flows=flows), [0, 1, 1])
    assert border.first.reason is Reason.MORE_MESSAGES
    assert (border.first.before.messages, border.first.after.messages) == (1, 2)


def test_the_memory_limit():
    """Half of the load is time, which would rather have atom 1 on rank 1."""
    given = problem(
        [5, 3, 3], 2, seconds=[6.0, 6.0, 0.0], memory_weight=0.1, memory_limit=8
    )
    border = only(given, [0, 0, 1])
    assert border.last.reason is Reason.NONE
    border = only(given, [0, 1, 1])
    assert border.first.reason is Reason.HEAVIER
    given = problem(
        [5, 4, 3], 2, seconds=[6.0, 6.0, 0.0], memory_weight=0.1, memory_limit=8
    )
    border = only(given, [0, 1, 1])
    assert border.first.reason is Reason.OVER_LIMIT
    assert border.first.after.most_bytes == 9


def test_nothing_speaks_against_a_better_place():
    given = problem([1, 1, 1, 1], 2, flows=chain_flows(1, 1, 1))
    border = only(given, [0, 1, 1, 1])
    assert border.first.reason is Reason.NONE
    assert border.first.after.fullest < border.first.before.fullest


def test_the_next_border_that_is_as_cheap():
    """Cuts of 3 bytes between blocks of two atoms, of 9 inside them."""
    given = problem([1] * 8, 2, flows=chain_flows(9, 3, 9, 3, 9, 2, 9))
    border = only(given, [0] * 4 + [1] * 4)
    assert border.earlier.atoms == (2, 3) and border.earlier.target == 1
    assert border.later.atoms == (4, 5) and border.later.target == 0
    assert border.earlier.after.cut_bytes == 3 and border.later.after.cut_bytes == 2
    assert border.earlier.after.fullest == border.later.after.fullest == 1.5


def test_partitions_without_atoms_have_no_border():
    given = problem([1, 1], 3)
    assert borders(given, [0, 2]) == ()
    assert borders(problem([1, 1], 1), [0, 0]) == ()


@pytest.mark.parametrize("seed", range(60))
def test_what_is_said_is_true(seed):
    given = random_problem(seed)
    chosen = partition_problem(given)
    found = borders(given, chosen)
    assert [border.left for border in found] == list(range(given.num_partitions - 1))
    for move in (move for border in found for move in border.moves):
        assert abs(move.source - move.target) == 1
        assert {chosen[atom] for atom in move.atoms} == {move.source}
        after = moved(chosen, move)
        assert given.is_contiguous(after)
        for said, partitions in ((move.before, chosen), (move.after, after)):
            fullest, cut, messages, most = recomputed(given, partitions)
            assert math.isclose(said.fullest, fullest)
            assert (said.cut_bytes, said.messages, said.most_bytes) == (
                cut,
                messages,
                most,
            )
            assert said == figures(given, partitions)
        check_reason(given, move, after)
    for border in found:
        check_next(given, chosen, border)


def check_reason(given, move, after):
    """The reason is worse there, and no reason that comes before it holds."""
    old, new = move.before, move.after
    fuller = new.fullest > old.fullest * (1 + SLACK)
    if move.reason is Reason.EMPTY:
        assert move.source not in after
    elif move.reason is Reason.OVER_LIMIT:
        assert new.most_bytes > given.memory_limit
    elif move.reason is Reason.CUTS_MORE:
        assert not fuller and new.cut_bytes > old.cut_bytes
    elif move.reason is Reason.MORE_MESSAGES:
        assert not fuller and new.cut_bytes == old.cut_bytes
        assert new.messages > old.messages
    elif move.reason is Reason.HEAVIER:
        assert new.fullest > old.fullest
        assert fuller or new.cut_bytes <= old.cut_bytes
    else:
        assert new.fullest <= old.fullest * (1 + 1e-9)
        assert new.cut_bytes <= old.cut_bytes


def check_next(given, chosen, border):
    """Between a border and the next one that is as cheap, every other one cuts more."""
    for move, side in ((border.earlier, -1), (border.later, 1)):
        if move is None:
            continue
        assert len(move.atoms) > 1
        assert move.after.cut_bytes <= move.before.cut_bytes
        for n in range(1, len(move.atoms)):
            fewer = move.atoms[-n:] if side < 0 else move.atoms[:n]
            between = [move.target if a in fewer else p for a, p in enumerate(chosen)]
            assert recomputed(given, between)[1] > move.before.cut_bytes
