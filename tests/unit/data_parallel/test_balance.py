"""Which replica keeps the state of which variable: a pure function."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from smp_tf.data_parallel.balance import balanced


def fullest(num_bytes: list[int], owners: list[int], replicas: int) -> int:
    totals = [0] * replicas
    for size, owner in zip(num_bytes, owners):
        totals[owner] += size
    return max(totals)


@pytest.mark.parametrize(
    ("num_bytes", "loads", "owners"),
    [
        ([90, 10, 40, 50, 30], [0, 0], [0, 1, 1, 1, 0]),
        ([], [0, 0, 0], []),
        ([5], [0, 0], [0]),
        ([7, 7, 7, 7], [0, 0], [0, 1, 0, 1]),
        ([0, 0, 0], [0, 0, 0], [0, 1, 2]),  # of unknown size
        ([4, 4], [100, 0], [1, 1]),  # the first has enough already
    ],
)
def test_the_largest_first_each_to_who_has_least(num_bytes, loads, owners):
    assert balanced(num_bytes, loads) == owners


sizes = st.lists(st.integers(1, 50), min_size=1, max_size=7)


@given(sizes, st.integers(1, 3))
def test_close_to_the_best_division(num_bytes, replicas):
    found = balanced(num_bytes, [0] * replicas)
    best = min(
        fullest(num_bytes, list(owners), replicas)
        for owners in itertools.product(range(replicas), repeat=len(num_bytes))
    )
    assert 3 * fullest(num_bytes, found, replicas) <= 4 * best


@given(st.lists(st.integers(1, 10**9), max_size=200), st.integers(1, 64))
def test_no_replica_has_more_than_its_share_and_one_variable(num_bytes, replicas):
    found = balanced(num_bytes, [0] * replicas)
    assert found == balanced(num_bytes, [0] * replicas)
    if num_bytes:
        share = sum(num_bytes) / replicas
        assert fullest(num_bytes, found, replicas) <= share + max(num_bytes)
