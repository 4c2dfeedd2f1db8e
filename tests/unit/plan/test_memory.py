"""Peak memory of each rank, against counts by hand and against intervals."""

import dataclasses

import pytest

from smp_tf.config import resolve
from smp_tf.plan.memory import memory_by_rank
from smp_tf.plan.step_plan import plan_step
from tests.unit.plan.example_graphs import (
    ROWS,
    SQUARE,
    chain,
    random_step,
    residual,
    tied,
    used_twice,
)

ACTIVATION = 4 * ROWS[1] * (ROWS[0] or 1)
WEIGHT = 4 * SQUARE[0] * SQUARE[1]


def plan(graph, partitions, microbatches, pipeline="interleaved"):
    config = {
        "partitions": partitions,
        "microbatches": microbatches,
        "pipeline": pipeline,
        "optimize": "speed",
    }
    return plan_step(graph, resolve(config, partitions), {}, {})


def activations(*args):
    return [memory.activations for memory in memory_by_rank(plan(*args))]


def test_what_a_rank_owns():
    """Four weights on each of two ranks, all trained, with Adam's two slots."""
    for memory in memory_by_rank(plan(chain(8), 2, 4)):
        assert memory.weights == memory.gradients == 4 * WEIGHT
        assert memory.optimizer == 8 * WEIGHT
        owned = memory.weights + memory.gradients + memory.optimizer
        assert memory.total == owned + memory.activations


def test_gpipe_holds_all_microbatches():
    """A layer keeps its output, and a rank but the first what it received."""
    few, many = activations(chain(8), 4, 2, "simple"), activations(
        chain(8), 4, 6, "simple"
    )
    grown = [(b - a) // 4 for a, b in zip(few, many)]
    loss = 4  # a float, which is returned: the last rank has them all at its peak
    assert grown == [
        2 * ACTIVATION,
        3 * ACTIVATION,
        3 * ACTIVATION,
        3 * ACTIVATION + loss,
    ]


def test_1f1b_holds_fewer_the_later_the_rank():
    """Rank i of p holds p - i microbatches, however many there are."""
    one, two = activations(chain(16), 4, 8)[1:3]
    assert one - two == 5 * ACTIVATION
    few, many = activations(chain(16), 4, 8), activations(chain(16), 4, 64)
    losses = 4 * (64 - 8)
    assert [b - a for a, b in zip(few, many)] == [0, 0, 0, losses]
    simple = activations(chain(16), 4, 64, "simple")
    assert all(a < b for a, b in zip(many, simple))


def intervals(found, rank):
    """The peak of what crosses from one function of a rank to another, each tensor
    from its first to its last action: the same by other means."""
    graph, stages = found.graph, found.segments.segments
    order = [a for a in found.schedule.ranks[rank] if not a.kind.is_send]
    seen: dict[tuple[str, int], list[int]] = {}
    for time, action in enumerate(order):
        segment = stages[action.stage]
        tensors = (*segment.inputs, *segment.outputs)
        if action.kind.is_recv:
            cuts = found.segments.cuts
            tensors = [
                c.tensor for c in cuts if (c.stage, c.peer) == (action.stage, rank)
            ]
        for tensor in tensors:
            seen.setdefault((tensor, action.mb), []).append(time)
    kept = set(graph.returns) - set(graph.gradient_of)
    until = {
        key: len(order) if key[0] in kept else times[-1] for key, times in seen.items()
    }
    return max(
        sum(
            graph.spec(tensor).num_bytes
            for (tensor, mb), times in seen.items()
            if times[0] <= time <= until[tensor, mb]
        )
        for time in range(len(order))
    )


@pytest.mark.parametrize("pipeline", ["interleaved", "simple"])
@pytest.mark.parametrize("partitions", [1, 2, 3])
@pytest.mark.parametrize("graph", [residual(6), tied(), *map(random_step, range(6))])
def test_no_less_than_what_lives_between_functions(graph, partitions, pipeline):
    atoms = len(plan(graph, 1, 1).atoms.atoms)
    found = plan(graph, min(partitions, atoms), 4, pipeline)
    for rank, memory in enumerate(memory_by_rank(found)):
        between = intervals(found, rank)
        inside = sum(
            graph.spec(f"{name}:{i}").num_bytes
            for segment in found.segments.segments
            if segment.partition == rank
            for name in segment.nodes
            for i in range(len(graph.by_name[name].outputs))
        )
        assert between <= memory.activations <= between + inside


def test_a_view_takes_nothing():
    """Forward only: with a Reshape for each Tanh nothing is there twice."""
    graph = used_twice()
    nodes = [
        dataclasses.replace(node, op="Reshape") if node.op == "Tanh" else node
        for node in graph.nodes
    ]
    viewed = dataclasses.replace(graph, nodes=tuple(nodes))
    assert activations(graph, 1, 1) == [2 * ACTIVATION]
    assert activations(viewed, 1, 1) == [2 * ACTIVATION]
