"""Cutting: which segments, which tensors cross, what each segment imports."""

import random

import pytest

from smp_tf.errors import PartitionError
from smp_tf.plan.atoms import pinned_atoms
from smp_tf.plan.graph import TensorSpec, node_of
from smp_tf.plan.pipeline import Kind
from smp_tf.plan.roles import assign_roles
from smp_tf.plan.segment import split_segments
from tests.unit.plan.example_graphs import (
    Builder,
    analyse,
    chain,
    random_step,
    residual,
    tied,
    uncrossable,
    used_twice,
    visits,
    with_metric,
)


def crossing(plan):
    """(tensor, source, peer) of every cut."""
    return [(cut.tensor, cut.source, cut.peer) for cut in plan.cuts]


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_a_chain_has_two_segments_per_partition(n):
    plan = analyse(chain(n)).cut(range(n))
    expected = [f"F{i}" for i in range(n)] + [f"B{i}" for i in reversed(range(n))]
    assert visits(plan).split() == expected
    links = [(c.source, c.peer) for c in plan.cuts if c.tensor != "loss:0"]
    down, up = [(i, i + 1) for i in range(n - 1)], [(i + 1, i) for i in range(n - 1)]
    assert sorted(links) == sorted(down + up)
    assert {(c.source, c.peer) for c in plan.cuts if c.tensor == "loss:0"} == {
        (n - 1, i) for i in range(n - 1)
    }


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_residual_stack_has_two_segments_and_one_tensor_per_link(n):
    """Gradient sums on the wrong partition would give one segment per block."""
    step = analyse(residual(4 * n))
    per_partition = len(step.atoms.atoms) // n
    plan = step.cut([i // per_partition for i in range(len(step.atoms.atoms))])
    assert len(plan.segments) == 2 * n
    links = [(c.source, c.peer) for c in plan.cuts if c.tensor != "loss:0"]
    assert len(links) == len(set(links)) == 2 * (n - 1)


def test_a_tied_weight_goes_around_the_ring():
    plan = analyse(tied()).cut([0, 1])
    assert visits(plan) == "F0 F1 F0 B0 B1 B0"
    needs = [segment.needs for segment in plan.segments]
    assert needs == [(), (0,), (1,), (1, 2), (0, 1, 3), (3, 4)]
    assert [s.stage for s in plan.segments] == list(range(6))


def test_a_layer_used_twice_goes_around_the_ring():
    assert visits(analyse(used_twice()).cut([0, 1])) == "F0 F1 F0"
    assert visits(analyse(used_twice()).cut([1, 0])) == "F1 F0 F1"


def test_weights_are_read_again_not_stashed():
    plan = analyse(chain(2)).cut([0, 1])
    forward, backward = plan.segments[1], plan.segments[2]
    assert "dense_1/read" in forward.nodes and "dense_1/read" in backward.nodes
    assert forward.captures == backward.captures == ("w1/handle",)
    assert not any("read" in tensor for s in plan.segments for tensor in s.inputs)
    assert set(backward.inputs) == {"dense_0/tanh:0", "dense_1/tanh:0"}


def test_a_weight_read_elsewhere_is_sent():
    """The loss uses a weight of another partition."""
    b = Builder()
    weight = b.variable("w0")
    x, _ = b.dense("d0", b.argument("x"), weight)
    x, _ = b.dense("d1", x, b.variable("w1"))
    w = b.read("loss/read", weight)
    b.returns.append(b.op("loss", "Mul", x, w, shape=()))
    plan = analyse(b.build()).cut([0, 1])
    assert ("loss/read:0", 0, 1) in crossing(plan)
    assert "loss/read" in plan.segments[0].nodes
    assert "loss/read" not in plan.segments[1].nodes
    assert plan.segments[1].captures == ("w1/handle",)


def test_free_nodes_are_copied_into_each_segment():
    b = Builder()
    one = b.op("one", "Const", shape=())
    two = b.op("two", "Add", one, one, shape=())
    x = b.argument("x")
    size = b.op("size", "Size", x, shape=(), dtype="int32")
    for i in range(2):
        x, _ = b.dense(f"d{i}", x, b.variable(f"w{i}"))
        x = b.op(f"scale{i}", "Mul", x, two, size, layer=f"model/d{i}")
    b.returns.append(x)
    plan = analyse(b.build()).cut([0, 1])
    for segment in plan.segments:
        assert {"one", "two", "size"} <= set(segment.nodes)
        assert segment.arguments == ("x:0",)
    assert {tensor for tensor, *_ in crossing(plan)} == {"scale0:0", "scale1:0"}


def test_effects_run_everywhere_with_what_they_need():
    plan = analyse(with_metric()).cut([0, 1])
    holders = [s for s in plan.segments if "metric/add" in s.nodes]
    assert sorted(s.partition for s in holders) == [0, 1]
    assert all("total/handle" in s.captures for s in holders)
    assert ("loss:0", 1, 0) in crossing(plan)
    assert sum(tensor == "loss:0" for tensor, *_ in crossing(plan)) == 1


def test_only_the_owner_gets_a_gradient_and_all_get_the_rest():
    plan = analyse(chain(3)).cut([0, 1, 2])
    stages = [list(plan.return_stage[t]) for t in plan.return_stage]
    assert stages == [[0, 1, 2], [2], [1], [0]]
    assert not any("dw" in tensor for tensor, *_ in crossing(plan))


def test_a_tensor_that_cannot_be_sent_is_named():
    graph = uncrossable(pins=(0, 1))
    roles = assign_roles(graph)
    atoms = pinned_atoms(graph, roles, 2, 1)
    with pytest.raises(PartitionError) as caught:
        split_segments(graph, roles, atoms, (0, 1), 2, {})
    for part in ("tensor='a/list:0'", "variant[]", "partition 0 to 1", "'b/unstack'"):
        assert part in str(caught.value)
    together = analyse(uncrossable()).cut([0, 1])
    assert visits(together) == "F0 F1"


def test_unknown_dimensions_cross_but_unknown_ranks_do_not():
    known = uncrossable(TensorSpec("float32", (None, 8)))
    plan = analyse(known).cut([0, 1, 1])
    cut = next(c for c in plan.cuts if c.tensor == "a/list:0")
    assert str(cut.spec) == "float32[?, 8]"
    assert len(analyse(uncrossable(TensorSpec("float32", None))).atoms.atoms) == 2


def test_a_result_that_cannot_be_sent_is_refused():
    b = Builder()
    x = b.argument("x")
    for i in range(2):
        x, _ = b.dense(f"d{i}", x, b.variable(f"w{i}"))
    b.returns.append(b.op("list", "TensorListFromTensor", x, dtype="variant"))
    with pytest.raises(PartitionError, match="'list:0'.*the returned values"):
        analyse(b.build()).cut([0, 1])


def test_partitions_may_be_empty():
    plan = analyse(chain(2)).cut([0, 2], num_partitions=4)
    assert visits(plan) == "F0 F2 B2 B0"
    assert {p for p in plan.return_stage["loss:0"]} == {0, 1, 2, 3}
    assert plan.pipeline().num_ranks == 4


def any_cut(seed, split_backward=False):
    """(step, plan) of a random model under a random assignment."""
    chance = random.Random(seed)
    step = analyse(random_step(seed))
    partitions = chance.randint(1, 4)
    chosen = [chance.randrange(partitions) for _ in step.atoms.atoms]
    return step, step.cut(chosen, partitions, split_backward)


@pytest.mark.parametrize("split_backward", [False, True])
@pytest.mark.parametrize("seed", range(60))
def test_any_assignment_can_be_cut(seed, split_backward):
    """Segments wait only for earlier ones, and have all that their nodes read."""
    step, plan = any_cut(seed, split_backward)
    place = {}
    for segment in plan.segments:
        nodes = set(segment.nodes)
        given = {*segment.inputs, *segment.arguments}
        for name in segment.nodes:
            for tensor in step.graph.by_name[name].inputs:
                source = node_of(tensor)
                assert tensor in given or source in nodes or source in segment.captures
        for tensor in segment.inputs:
            assert place[tensor, segment.partition] < segment.stage, tensor
            assert place[tensor, segment.partition] in segment.needs
        assert all(need < segment.stage for need in segment.needs)
        for tensor in segment.outputs:
            assert node_of(tensor) in nodes
            place[tensor, segment.partition] = segment.stage
            for cut in plan.cuts:
                if (cut.tensor, cut.stage) == (tensor, segment.stage):
                    place[tensor, cut.peer] = segment.stage
        backward = [name in step.roles.backward for name in segment.nodes]
        if segment.kind is Kind.F:
            assert not any(backward)
    pairs = [(c.tensor, c.peer) for c in plan.cuts]
    assert len(pairs) == len(set(pairs)), "a tensor crosses twice to one rank"
    for tensor, ranks in plan.return_stage.items():
        for rank, stage in ranks.items():
            assert place[tensor, rank] == stage
    placed = [n.name for n in step.graph.nodes if step.roles.is_placed(n.name)]
    for name in placed:
        assert sum(name in s.nodes for s in plan.segments) == 1, name
    plan.pipeline()  # checks its own rules
