"""The whole way from a graph to schedules, as one pure function."""

import dataclasses

import pytest

from smp_tf.config import resolve
from smp_tf.errors import PartitionError, ScheduleError
from smp_tf.plan.graph import Graph
from smp_tf.plan.plan_step import plan_step
from tests.unit.plan.example_graphs import (
    chain,
    random_step,
    residual,
    tied,
    visits,
    with_metric,
)


def plan(graph, owner=None, layers=None, **config):
    partitions = config.setdefault("partitions", 2)
    config.setdefault("microbatches", 4)
    return plan_step(graph, resolve(config, partitions), owner or {}, layers or {})


@pytest.mark.usefixtures("quick_messages")
@pytest.mark.parametrize("pipeline", ["interleaved", "simple"])
@pytest.mark.parametrize("partitions", [1, 2, 3, 4])
def test_a_stack_is_balanced_cut_and_scheduled(partitions, pipeline):
    found = plan(residual(12), partitions=partitions, pipeline=pipeline)
    assert found.num_partitions == partitions and found.num_microbatches == 4
    assert len(found.segments.segments) == 2 * partitions
    counts = [list(found.owner.values()).count(p) for p in range(partitions)]
    assert max(counts) - min(counts) <= 1, counts
    assert list(found.owner.values()) == sorted(found.owner.values())
    calls = sum(a.kind.is_compute for rank in found.schedule.ranks for a in rank)
    assert calls == 4 * 2 * partitions
    ideal = (partitions - 1) / (4 + partitions - 1)
    assert found.report.bubble == pytest.approx(ideal, abs=0.08)
    peaks = [4] * partitions
    if pipeline == "interleaved":
        peaks = [min(4, partitions - i) for i in range(partitions)]
    assert list(found.report.peak_live) == peaks


def test_the_same_on_every_rank():
    for seed in range(10):
        one, other = (plan(random_step(seed), partitions=1) for _ in range(2))
        assert one == other
    assert plan(tied()) == plan(tied())


def test_layers_and_owners_are_readable():
    found = plan(tied())
    assert dict(found.owner) == {0: 0, 1: 1}
    assert dict(found.partition_of_layer) == {
        "model/embed": 0, "model": 0, "model/dense": 1,
    }  # fmt: skip
    assert visits(found.segments) == "F0 F1 F0 B0 B1 B0"


def test_a_later_step_follows_the_first():
    first = plan(chain(4))
    unbalanced = {0: 0, 1: 1, 2: 1, 3: 1}
    later = plan(chain(4), owner=unbalanced)
    assert later.owner == unbalanced != first.owner
    assert plan(chain(4), owner=dict(first.owner)) == first


def test_evaluation_follows_training():
    train = plan(chain(4))
    graph = chain(4)
    forward = Graph(
        tuple(n for n in graph.nodes if not n.is_gradient),
        graph.arguments,
        graph.captures,
        graph.variables,
        (),
        ("loss:0",),
        {},
    )
    found = plan(forward, dict(train.owner), dict(train.partition_of_layer))
    assert visits(found.segments) == "F0 F1"
    assert found.owner == train.owner
    assert found.report.peak_live == (0, 0)


def test_pins_replace_the_partitioner():
    graph = chain(3)
    pins = {"model/dense_0": 1, "model/dense_1": 0}
    nodes = tuple(dataclasses.replace(n, pin=pins.get(n.layer)) for n in graph.nodes)
    graph = dataclasses.replace(graph, nodes=nodes)
    found = plan(graph, auto_partition=False, default_partition=1)
    assert dict(found.owner) == {0: 1, 1: 0, 2: 1}
    assert visits(found.segments) == "F1 F0 F1 B1 B0 B1"
    assert plan(graph).owner[0] == 0, "pins count without auto_partition only"


def test_what_cannot_be_split_says_why():
    with pytest.raises(PartitionError, match="partitions=3 atoms=2"):
        plan(chain(2), partitions=3)


def test_a_metric_on_every_rank():
    found = plan(with_metric())
    holders = [s.partition for s in found.segments.segments if "metric/add" in s.nodes]
    assert sorted(holders) == [0, 1]


def test_unknown_batch_sizes_are_planned():
    graph = chain(4)
    unknown = dataclasses.replace(
        graph,
        nodes=tuple(
            dataclasses.replace(
                node,
                outputs=tuple(
                    dataclasses.replace(
                        spec, shape=(None, 8) if spec.shape == (4, 8) else spec.shape
                    )
                    for spec in node.outputs
                ),
            )
            for node in graph.nodes
        ),
    )
    assert plan(unknown).owner == plan(graph).owner


def test_schedule_errors_come_through():
    config = resolve({"partitions": 2, "microbatches": 2}, 2)
    with pytest.raises(ScheduleError):
        plan_step(chain(2), dataclasses.replace(config, pipeline="unknown"), {}, {})
