"""``smp.shard_dataset``, for every dp_rank of a job that is made up."""

import dataclasses
from collections.abc import Iterator

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.errors import ConfigError, NotInitializedError
from smp_tf.runtime import session as sessions
from smp_tf.topology import Topology
from tests.unit.one_process import session


@pytest.fixture
def one_process() -> Iterator[None]:
    with session():
        yield


def parts(dataset: tf.data.Dataset, size: int, **options: bool) -> list[list[int]]:
    """What each of ``size`` replicas of one rank gets."""
    ordinary, found = sessions._session, []
    try:
        for rank in range(size):
            sessions._session = dataclasses.replace(
                ordinary,
                topology=Topology(size, pp_size=1, tp_size=1, placement="cluster"),
                launch=dataclasses.replace(ordinary.launch, rank=rank, size=size),
            )
            sharded = smp.shard_dataset(dataset, **options)
            found.append([int(each) for each in sharded])
    finally:
        sessions._session = ordinary
    return found


@pytest.mark.parametrize("size", (1, 2, 3, 4))
@pytest.mark.parametrize("count", (12, 13, 14, 2))
def test_parts_are_equal_and_disjoint(
    one_process: None, size: int, count: int
) -> None:
    found = parts(tf.data.Dataset.range(count), size)
    assert {len(part) for part in found} == {count // size}
    every = [each for part in found for each in part]
    assert sorted(every) == list(range(count - count % size))


def test_nothing_is_left_out_of_an_evaluation(one_process: None) -> None:
    found = parts(tf.data.Dataset.range(14), 4, drop_remainder=False)
    assert sorted(sum(found, [])) == list(range(14))


def test_a_dataset_of_unknown_size_is_shared_out(one_process: None) -> None:
    unknown = tf.data.Dataset.range(14).filter(lambda each: each % 2 == 0)
    assert parts(unknown, 2) == [[0, 4, 8, 12], [2, 6, 10]]


def test_one_replica_has_all(one_process: None) -> None:
    dataset = tf.data.Dataset.range(3)
    assert smp.shard_dataset(dataset) is dataset


def test_wrong_use_is_refused(one_process: None) -> None:
    with pytest.raises(ConfigError, match="type=list.*dp_rank"):
        smp.shard_dataset([1, 2])


def test_it_needs_a_session() -> None:
    with pytest.raises(NotInitializedError, match="shard_dataset"):
        smp.shard_dataset(tf.data.Dataset.range(3))
