"""Peak memory of each rank, against counts by hand and against intervals."""

import dataclasses

import pytest

from smp_tf.config import resolve
from smp_tf.plan.memory import memory_by_rank
from smp_tf.plan.piece import split_segment
from smp_tf.plan.plan_step import plan_step
from tests.unit.plan.example_graphs import (
    ROWS,
    SQUARE,
    Builder,
    chain,
    random_step,
    residual,
    tied,
    used_twice,
)

pytestmark = pytest.mark.usefixtures("quick_messages")

ACTIVATION = 4 * ROWS[1] * (ROWS[0] or 1)
WEIGHT = 4 * SQUARE[0] * SQUARE[1]


def plan(graph, partitions, microbatches, pipeline="interleaved", slots=2):
    config = {
        "partitions": partitions,
        "microbatches": microbatches,
        "pipeline": pipeline,
        "optimize": "speed",
    }
    return plan_step(graph, resolve(config, partitions), {}, {}, slots)


def activations(*args):
    return [memory.activations for memory in memory_by_rank(plan(*args))]


def test_what_a_rank_owns():
    """Four weights on each of two ranks, all trained, with Adam's two slots."""
    for memory in memory_by_rank(plan(chain(8), 2, 4)):
        assert memory.weights == memory.gradients == 4 * WEIGHT
        assert memory.optimizer == 8 * WEIGHT
        owned = memory.weights + memory.gradients + memory.optimizer
        assert memory.total == owned + round(1.12 * memory.activations) + memory.update


LARGE = (2048, 2048)
LARGE_WEIGHT = 4 * LARGE[0] * LARGE[1]


def with_large_weights(graph):
    """So large that gradients leave their function in pieces, before the next ones."""
    nodes = [
        dataclasses.replace(node, outputs=tuple(map(enlarged, node.outputs)))
        for node in graph.nodes
    ]
    variables = [
        dataclasses.replace(variable, spec=enlarged(variable.spec))
        for variable in graph.variables
    ]
    return dataclasses.replace(graph, nodes=tuple(nodes), variables=tuple(variables))


def enlarged(spec):
    return dataclasses.replace(spec, shape=LARGE) if spec.shape == SQUARE else spec


def test_the_update_begins_when_the_activations_are_gone():
    """Two copies of the weights: gradients and one more, which takes their room."""
    graph = with_large_weights(chain(8))
    (memory,) = memory_by_rank(plan(graph, 1, 2))
    assert memory.gradients == 8 * LARGE_WEIGHT
    assert 0 < memory.activations < 3 * LARGE_WEIGHT
    assert memory.activations + memory.update == 8 * LARGE_WEIGHT
    (memory,) = memory_by_rank(plan(graph, 1, 2, slots=0))
    assert memory.update == 0
    (memory,) = memory_by_rank(plan(chain(8), 1, 8, "simple"))
    assert memory.activations > 8 * WEIGHT
    assert memory.update == 0


def test_the_update_of_a_gradient_in_parts():
    """A sparse gradient is not summed: its update makes both copies."""
    graph = with_large_weights(chain(8))
    (dense,) = memory_by_rank(plan(graph, 1, 2))
    gradient_of = {f"grad/dense_{i}/dw:0": max(i, 1) for i in range(8)}
    graph = dataclasses.replace(graph, gradient_of=gradient_of)
    (memory,) = memory_by_rank(plan(graph, 1, 2))
    assert memory.gradients == 6 * LARGE_WEIGHT
    update = memory.gradients + memory.activations + memory.update
    assert update == 2 * 7 * LARGE_WEIGHT
    tensors, before = (each.total - each.allocator for each in (memory, dense))
    assert tensors == before - 2 * LARGE_WEIGHT


def test_gpipe_holds_all_microbatches():
    """A layer keeps its output, a rank but the first what it received, and each rank
    the batch."""
    few, many = activations(chain(8), 4, 2, "simple"), activations(
        chain(8), 4, 6, "simple"
    )
    grown = [(b - a) // 4 for a, b in zip(few, many)]
    loss = 4  # a float, which is returned: the last rank has them all at its peak
    assert grown == [
        3 * ACTIVATION,
        4 * ACTIVATION,
        4 * ACTIVATION,
        4 * ACTIVATION + loss,
    ]


def test_1f1b_holds_fewer_the_later_the_rank():
    """Rank i of p holds p - i microbatches, however many there are."""
    one, two = activations(chain(16), 4, 8)[1:3]
    assert one - two == 5 * ACTIVATION
    few, many = activations(chain(16), 4, 8), activations(chain(16), 4, 64)
    batch, losses = (64 - 8) * ACTIVATION, 4 * (64 - 8)
    assert [b - a for a, b in zip(few, many)] == [batch, batch, batch, batch + losses]
    simple = activations(chain(16), 4, 64, "simple")
    assert all(a < b for a, b in zip(many, simple))


def intervals(found, rank):
    """The peak of what crosses from one function of a rank to another, each tensor
    from its first to its last function, and if it is received from one action
    earlier: the same by other means."""
    graph, stages = found.graph, found.segments.segments
    seen: dict[tuple[str, int], list[int]] = {}
    begun = 0  # when the last action began
    calls = 0
    for action in found.schedule.ranks[rank]:
        if action.kind.is_recv:
            for cut in found.segments.cuts:
                if (cut.stage, cut.peer) == (action.stage, rank):
                    seen.setdefault((cut.tensor, action.mb), []).append(begun)
        elif action.kind.is_compute:
            begun = calls
            for piece in split_segment(graph, stages[action.stage], {}):
                for tensor in (*piece.inputs, *piece.outputs):
                    seen.setdefault((tensor, action.mb), []).append(calls)
                calls += 1
    kept = set(graph.returns) - set(graph.gradient_of)
    until = {key: calls if key[0] in kept else times[-1] for key, times in seen.items()}
    batch = sum(graph.spec(tensor).num_bytes for tensor in graph.arguments)
    return found.num_microbatches * batch + max(
        sum(
            graph.spec(tensor).num_bytes
            for (tensor, mb), times in seen.items()
            if times[0] <= time <= until[tensor, mb]
        )
        for time in range(calls)
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
    """Forward only: with a Reshape for each Tanh nothing is there twice, but for the
    batch."""
    graph = used_twice()
    nodes = [
        dataclasses.replace(node, op="Reshape") if node.op == "Tanh" else node
        for node in graph.nodes
    ]
    viewed = dataclasses.replace(graph, nodes=tuple(nodes))
    assert activations(graph, 1, 1) == [3 * ACTIVATION]
    assert activations(viewed, 1, 1) == [3 * ACTIVATION]


def test_branches_are_begun_before_one_is_ended():
    """Three Tanh of one tensor, each read by a Mean: all at once, and the batch."""
    b = Builder()
    y, _ = b.dense("dense", b.argument("x"), b.variable("w"))
    for i in range(3):
        each = b.op(f"tanh_{i}", "Tanh", y, layer="model/dense")
        b.returns.append(b.op(f"mean_{i}", "Mean", each, shape=()))
    assert activations(b.build(), 1, 1) == [(1 + 1 + 3) * ACTIVATION]
