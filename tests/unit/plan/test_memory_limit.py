"""A hard limit on each rank's memory is kept, or refused with what could be kept."""

import re

import pytest

from smp_tf.errors import PartitionError
from smp_tf.plan.memory import memory_by_rank
from tests.unit.plan.example_graphs import SQUARE, Builder, chain
from tests.unit.plan.test_step_plan import plan


def fullest(found):
    return max(each.total for each in memory_by_rank(found))


def fast_and_large():
    """Two small layers that take the time, two large ones that take the bytes."""
    b = Builder()
    x = b.argument("x")
    for i in range(4):
        shape = (64, SQUARE[1]) if i >= 2 else SQUARE
        x, _ = b.dense(f"dense_{i}", x, b.variable(f"w{i}", shape))
        if i < 2:
            for j in range(20):
                x = b.op(f"more_{i}_{j}", "Tanh", x, layer=f"model/dense_{i}")
    b.returns.append(x)
    return b.build()


def test_without_a_limit_speed_decides_and_with_one_memory_does():
    free = plan(fast_and_large(), memory_weight=0.0)
    limit = fullest(free) - 1
    kept = plan(fast_and_large(), memory_weight=0.0, memory_limit_bytes=limit)
    assert free.partition_of_atom != kept.partition_of_atom
    assert fullest(kept) <= limit < fullest(free)
    same = plan(fast_and_large(), memory_weight=0.0, memory_limit_bytes=limit + 1)
    assert same.partition_of_atom == free.partition_of_atom


@pytest.mark.parametrize("pipeline", ["interleaved", "simple"])
@pytest.mark.parametrize("graph", [chain(6), fast_and_large()])
def test_what_cannot_be_kept_is_refused_with_what_can(graph, pipeline):
    with pytest.raises(PartitionError, match="memory_limit_bytes=1 partitions=2") as e:
        plan(graph, memory_limit_bytes=1, pipeline=pipeline)
    smallest = int(re.search(r"kept is (\d+);", str(e.value))[1])
    kept = plan(graph, memory_limit_bytes=smallest, pipeline=pipeline)
    assert fullest(kept) == smallest
    with pytest.raises(PartitionError, match=f"kept is {smallest};"):
        plan(graph, memory_limit_bytes=smallest - 1, pipeline=pipeline)


def test_a_partition_that_is_given_is_refused_if_it_is_too_large():
    given = {0: 0, 1: 0, 2: 0, 3: 1}
    needs = fullest(plan(chain(4), owner=given))
    assert plan(chain(4), owner=given, memory_limit_bytes=needs)
    with pytest.raises(PartitionError, match=f"memory_limit_bytes={needs - 1} .*"):
        plan(chain(4), owner=given, memory_limit_bytes=needs - 1)
