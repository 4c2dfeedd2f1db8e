"""Pieces of a segment: together they are the segment, one after the other."""

import dataclasses

import pytest

from smp_tf.plan import piece
from smp_tf.plan.graph import Node, node_of
from smp_tf.plan.piece import split_segment
from tests.unit.plan.example_graphs import (
    analyse,
    chain,
    random_step,
    residual,
    tied,
    with_metric,
)

MANY = 10**6


@pytest.fixture(autouse=True)
def as_many_pieces_as_asked_for(monkeypatch):
    monkeypatch.setattr(piece, "MAX_PIECES", MANY)


def gradients_of(graph):
    return {tensor: 4 for tensor in graph.returns if tensor in graph.gradient_of}


def check_pieces(graph, segment, pieces):
    """They can run in order, and do what the segment does."""
    nodes = [name for each in pieces for name in each.nodes]
    assert sorted(nodes) == sorted(segment.nodes)
    outside = {*segment.inputs, *segment.arguments}
    made = set()
    for each in pieces:
        assert each.stage == segment.stage and each.partition == segment.partition
        given = {*each.inputs, *each.arguments}
        assert given <= outside | made
        here = set()
        for name in each.nodes:
            for tensor in graph.by_name[name].inputs:
                source = node_of(tensor)
                assert source in here or tensor in given or source in each.captures
            here.add(name)
        assert all(node_of(tensor) in here for tensor in each.outputs)
        made.update(each.outputs)
    assert set(segment.outputs) <= made
    captures = {name for each in pieces for name in each.captures}
    assert captures == set(segment.captures)


@pytest.mark.parametrize("seed", range(20))
def test_pieces_of_random_steps(seed):
    step = analyse(random_step(seed))
    count = len(step.atoms.atoms)
    plan = step.cut([2 * i // count for i in range(count)])
    for segment in plan.segments:
        pieces = split_segment(step.graph, segment, gradients_of(step.graph), 1)
        check_pieces(step.graph, segment, pieces)


@pytest.mark.parametrize(
    "graph", [chain(8), residual(6), tied(), with_metric()], ids=str
)
def test_one_gradient_in_each_piece(graph):
    step = analyse(graph)
    plan = step.cut([0] * len(step.atoms.atoms))
    sizes = gradients_of(step.graph)
    for segment in plan.segments:
        pieces = split_segment(step.graph, segment, sizes, 1)
        check_pieces(step.graph, segment, pieces)
        makers = {node_of(tensor) for tensor in segment.outputs if tensor in sizes}
        if len(makers) > 1:
            assert len(makers) <= len(pieces) <= len(makers) + 1


def test_little_is_left_whole(monkeypatch):
    step = analyse(chain(8))
    plan = step.cut([0] * 8)
    sizes = gradients_of(step.graph)
    backward = plan.segments[-1]
    assert split_segment(step.graph, backward, sizes) == [backward]
    total = sum(sizes.get(tensor, 0) for tensor in backward.outputs)
    assert split_segment(step.graph, backward, sizes, total) == [backward]
    assert len(split_segment(step.graph, backward, sizes, total // 2)) == 2
    monkeypatch.setattr(piece, "MAX_PIECES", 4)
    assert len(split_segment(step.graph, backward, sizes, 1)) == 4


@pytest.mark.parametrize("n", [2, 3, 4])
def test_a_backward_begins_with_what_others_wait_for(n):
    step = analyse(chain(2 * n))
    plan = step.cut([i // 2 for i in range(2 * n)])
    gradients = {cut.tensor for cut in plan.cuts if cut.stage >= n}
    assert len(gradients) == n - 1
    for segment in plan.segments:
        first, *rest = split_segment(step.graph, segment, gradients_of(step.graph))
        check_pieces(step.graph, segment, [first, *rest])
        sent = gradients & set(segment.outputs)
        assert len(rest) == len(sent)
        if sent:
            assert sent < set(first.outputs)
            assert any("dw" in tensor for tensor in rest[0].outputs)
            assert not any("dw" in name for name in first.nodes)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_sent_is_not_in_a_late_piece(seed):
    step = analyse(random_step(seed))
    plan = step.cut([i % 3 for i in range(len(step.atoms.atoms))], 3)
    for segment in plan.segments:
        pieces = split_segment(step.graph, segment, gradients_of(step.graph))
        check_pieces(step.graph, segment, pieces)
        sent = {cut.tensor for cut in plan.cuts if cut.stage == segment.stage}
        for late in pieces[1:]:
            assert not sent & set(late.outputs)


def returning_copies(num_layers):
    """A chain whose gradients are copied at its end, in the order of the variables, as
    TensorFlow's functions return them: when all that has a state is over."""
    graph = chain(num_layers)
    reads = tuple(node.name for node in graph.nodes if node.is_stateful)
    over = Node("NoOp", "NoOp", (), reads, ())
    copy_of = {
        tensor: f"Identity_{index}:0"
        for tensor, index in sorted(graph.gradient_of.items(), key=lambda each: each[1])
    }
    copies = [
        dataclasses.replace(
            graph.by_name[node_of(tensor)],
            name=node_of(copy),
            op="Identity",
            inputs=(tensor,),
            controls=(over.name,),
            forward="",
        )
        for tensor, copy in copy_of.items()
    ]
    return dataclasses.replace(
        graph,
        nodes=(*graph.nodes, over, *copies),
        returns=tuple(copy_of.get(tensor, tensor) for tensor in graph.returns),
        gradient_of={copy_of[t]: index for t, index in graph.gradient_of.items()},
    )


@pytest.mark.parametrize("n", [1, 2])
def test_gradients_come_as_backward_makes_them(n):
    step = analyse(returning_copies(6))
    plan = step.cut([i * n // 6 for i in range(6)])
    sizes = gradients_of(step.graph)
    for segment in plan.segments:
        pieces = split_segment(step.graph, segment, sizes, 1)
        check_pieces(step.graph, segment, pieces)
        made = [t for each in pieces for t in each.outputs if t in sizes]
        order = [step.graph.gradient_of[tensor] for tensor in made]
        assert order == sorted(order, reverse=True)
        if order:
            # The first of them does not wait for the whole way back.
            dx = [name for name in pieces[0].nodes if name.endswith("/dx")]
            assert n > 1 or len(dx) <= 1
