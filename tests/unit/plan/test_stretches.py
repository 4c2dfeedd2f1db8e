"""Rows of stretches of one order, and fillings of a graph, against enumeration."""

import itertools

import pytest

from smp_tf.plan.downsets import near_borders
from smp_tf.plan.orders import orders
from smp_tf.plan.packing import pack
from smp_tf.plan.partition import partition_problem
from smp_tf.plan.stretches import Stretches
from tests.unit.plan.example_problems import problem, random_problem


def rows(given):
    """Every way to cut the order of first use."""
    n, p = given.num_atoms, given.num_partitions
    for inner in itertools.combinations(range(1, n), p - 1):
        bounds = (0, *inner, n)
        yield tuple(
            k
            for k, (a, b) in enumerate(itertools.pairwise(bounds))
            for _ in range(a, b)
        )


@pytest.mark.parametrize("seed", range(200))
def test_one_order_is_solved_exactly(seed):
    given = random_problem(seed, atoms=10)
    stretches = Stretches(given, range(given.num_atoms))
    load_of = {each: max(given.loads(each)) for each in rows(given)}
    best = stretches.best_bottleneck
    assert best == pytest.approx(min(load_of.values()))
    for limit in (best, 1.1 * best, 2.0 * best):
        chosen = stretches.cheapest(limit)
        allowed = [each for each, load in load_of.items() if load <= limit + 1e-9]
        assert chosen in allowed
        assert given.cut_bytes(chosen) == min(map(given.cut_bytes, allowed))


def test_an_early_rank_leaves_what_only_a_later_one_can_hold():
    """The large atom fits on the last rank only, so those before hold one each, though
    the first could hold both."""
    given = problem([1, 1, 0], 3, activations=[0, 0, 6], in_flight=[3, 2, 1])
    stretches = Stretches(given, range(3))
    chosen = stretches.cheapest(stretches.best_bottleneck)
    assert chosen == (0, 1, 2)
    assert max(given.memory(chosen)) == 6


@pytest.mark.parametrize("seed", range(40))
def test_a_packing_is_contiguous_without_gaps_and_within_its_load(seed):
    given = random_problem(seed, atoms=40)
    tried = list(orders(given))
    upper = min(Stretches(given, order).best_bottleneck for order in tried)
    found = pack(given, tried, 1.5 * upper)
    assert found is not None and set(found) == set(range(given.num_partitions))
    assert given.is_contiguous(found)
    assert max(given.loads(found)) <= upper * 1.01


def test_branches_are_packed_where_no_stretch_fits():
    """Four branches of 3 and 5: two ranks of 16 need one of each on both sides of an
    order that has them in pairs."""
    given = problem(
        [3, 5, 3, 5, 3, 5, 3, 5], 2,
        edges=[(0, 4), (1, 5), (2, 6), (3, 7)],
        flows=[(0, (4,), 1), (1, (5,), 1), (2, (6,), 1), (3, (7,), 1)],
    )  # fmt: skip
    chosen = partition_problem(given)
    assert given.loads(chosen) == (0.5, 0.5) and given.cut_bytes(chosen) == 0


@pytest.mark.parametrize("seed", range(20))
def test_what_is_near_a_partition_is_never_worse(seed):
    given = random_problem(seed, atoms=40)
    start = Stretches(given, range(given.num_atoms))
    chosen = start.cheapest(start.best_bottleneck * 1.2)
    worst = max(given.loads(chosen))
    near = near_borders(given, chosen)
    cheaper, lighter = near.cheapest(worst), near.lightest(worst)
    for found in (cheaper, lighter):
        assert given.is_contiguous(found)
        assert set(found) == set(range(given.num_partitions))
        assert max(given.loads(found)) <= worst + 1e-9
    assert given.cut_bytes(cheaper) <= given.cut_bytes(chosen)
