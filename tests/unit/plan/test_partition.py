"""The partitioner against an exhaustive search; following an earlier placement."""

import itertools
import random

import pytest

from smp_tf.errors import PartitionError
from smp_tf.plan.atoms import Atom, Atoms
from smp_tf.plan.partition import (
    SLACK,
    cut_bytes_between,
    follow_placement,
    partition_atoms,
)
from tests.unit.plan.example_graphs import analyse, chain, residual, tied


def all_splits(n, p):
    """Every way to cut 0..n into p non-empty stretches, as bounds."""
    for inner in itertools.combinations(range(1, n), p - 1):
        yield (0, *inner, n)


def heaviest(loads, bounds):
    return max(sum(loads[a:b]) for a, b in itertools.pairwise(bounds))


def cut(cut_bytes, bounds):
    return sum(cut_bytes[i] for i in bounds[1:-1])


def bounds_of(chosen):
    assert list(chosen) == sorted(chosen)
    p = max(chosen) + 1
    assert set(chosen) == set(range(p)), "an empty partition"
    return tuple(chosen.index(k) for k in range(p)) + (len(chosen),)


def instance(seed):
    chance = random.Random(seed)
    n = chance.randint(1, 10)
    p = chance.randint(1, min(n, 4))
    kind = chance.choice(["float", "small ints", "zeros", "one heavy"])
    loads = {
        "float": [chance.random() for _ in range(n)],
        "small ints": [float(chance.randint(0, 3)) for _ in range(n)],
        "zeros": [0.0] * n,
        "one heavy": [100.0 if i == n // 2 else chance.random() for i in range(n)],
    }[kind]
    return loads, [chance.randint(0, 5) for _ in range(n + 1)], p


@pytest.mark.parametrize("seed", range(300))
def test_equals_an_exhaustive_search(seed):
    loads, cut_bytes, p = instance(seed)
    chosen = partition_atoms(loads, cut_bytes, p)
    assert len(chosen) == len(loads)
    bounds = bounds_of(chosen)
    assert len(bounds) == p + 1
    splits = list(all_splits(len(loads), p))
    best = min(heaviest(loads, split) for split in splits)
    limit = best * (1 + SLACK) + 1e-9
    assert heaviest(loads, bounds) <= limit
    fewest = min(cut(cut_bytes, s) for s in splits if heaviest(loads, s) <= limit)
    assert cut(cut_bytes, bounds) == fewest
    balanced = min(
        heaviest(loads, s)
        for s in splits
        if heaviest(loads, s) <= limit and cut(cut_bytes, s) == fewest
    )
    assert heaviest(loads, bounds) == pytest.approx(balanced)
    assert partition_atoms(list(loads), list(cut_bytes), p) == chosen


def test_balance_first_then_fewest_bytes():
    assert partition_atoms([1, 1, 1, 1], [0, 9, 1, 9, 0], 2) == (0, 0, 1, 1)
    # 1 % more load on one side, within the slack, saves 90 bytes
    assert partition_atoms([100, 1, 1, 100], [0, 90, 95, 5, 0], 2) == (0, 0, 0, 1)
    # 10 % more is too much for any saving
    assert partition_atoms([10, 1, 1, 10], [0, 90, 95, 5, 0], 2) == (0, 0, 1, 1)


def test_as_many_partitions_as_atoms():
    assert partition_atoms([5, 0, 1], [0] * 4, 3) == (0, 1, 2)


def test_more_partitions_than_atoms():
    with pytest.raises(PartitionError, match="partitions=3 atoms=2; use fewer"):
        partition_atoms([1.0, 1.0], [0, 0, 0], 3)


def test_large_instances_are_quick():
    chance = random.Random(0)
    loads = [chance.random() for _ in range(600)]
    chosen = partition_atoms(loads, [1] * 601, 16)
    assert heaviest(loads, bounds_of(chosen)) < 1.1 * sum(loads) / 16


def test_cut_bytes_count_every_tensor_once():
    """[4, 8] floats are 128 bytes: forward x, backward its gradient."""
    step = analyse(chain(3))
    assert cut_bytes_between(step.graph, step.roles, step.atoms)[1:3] == (256, 256)
    step = analyse(residual(2))
    names = step.atom_names()
    assert names == [
        ("model/block_0",), ("model",), ("model/block_1",), ("model",),
    ]  # fmt: skip
    between = cut_bytes_between(step.graph, step.roles, step.atoms)
    assert between[2] == 256  # x forward (for the block and the sum), grad/sum back
    assert between[3] == 128 + 128 + 128  # x and y forward, the gradient back


def test_cut_bytes_of_a_tensor_that_spans_atoms():
    step = analyse(tied())
    between = cut_bytes_between(step.graph, step.roles, step.atoms)
    # embed -> dense -> head: e and h cross, and their gradients
    assert between[1] == 4 * 128


def atoms_of(*variables):
    """One atom per tuple of variables, in layers m/0, m/1, .."""
    atoms = tuple(Atom((f"m/{i}",), v) for i, v in enumerate(variables))
    return Atoms(atoms, {}, {})


def test_follow_an_earlier_placement():
    atoms = atoms_of((0,), (), (1,), (), (2,))
    assert follow_placement(atoms, {}, {}) is None
    assert follow_placement(atoms, {0: 0, 1: 1, 2: 1}, {}) == (0, 0, 1, 1, 1)
    assert follow_placement(atoms, {0: 0, 1: 1, 2: 1}, {"m/1": 1}) == (0, 1, 1, 1, 1)
    # the variable's owner counts more than the layer
    assert follow_placement(atoms, {0: 1}, {"m/0": 0}) == (1, 1, 1, 1, 1)
    assert follow_placement(atoms, {2: 1}, {}) == (1, 1, 1, 1, 1)


def test_an_atom_cannot_follow_two_owners():
    with pytest.raises(PartitionError, match=r"\['m/0'\].*\[0, 1\]"):
        follow_placement(atoms_of((0, 1)), {0: 0, 1: 1}, {})
