"""The cost model against numbers worked out by hand."""

import dataclasses

import pytest

from smp_tf.plan.cost import (
    BYTES_PER_SECOND,
    FLOPS_PER_SECOND,
    OPTIMIZER_SLOTS,
    Cost,
    atom_costs,
    node_flops,
    node_seconds,
)
from tests.unit.plan.example_graphs import SQUARE, Builder, analyse, chain, tied


def flops(op, inputs, output):
    """Of a single operation with tensors of these shapes."""
    b = Builder()
    tensors = [b.op(f"in{i}", "X", shape=shape) for i, shape in enumerate(inputs)]
    b.op("op", op, *tensors, shape=output)
    graph = b.build()
    return node_flops(graph, graph.by_name["op"])


@pytest.mark.parametrize(
    "op, inputs, output, expected",
    [
        ("MatMul", [(4, 8), (8, 5)], (4, 5), 2 * 4 * 8 * 5),
        ("MatMul", [(8, 4), (8, 5)], (4, 5), 2 * 4 * 8 * 5),  # transpose_a
        ("BatchMatMulV2", [(3, 4, 8), (3, 8, 5)], (3, 4, 5), 2 * 3 * 4 * 8 * 5),
        ("MatMul", [(None, 8), (8, 5)], (None, 5), 2 * 8 * 5),
        (
            "Conv2D",
            [(2, 8, 8, 3), (3, 3, 3, 16)],
            (2, 8, 8, 16),
            2 * (2 * 8 * 8 * 16) * (3 * 3 * 3),
        ),
        (
            "DepthwiseConv2dNative",
            [(2, 8, 8, 6), (3, 3, 6, 1)],
            (2, 8, 8, 6),
            2 * (2 * 8 * 8 * 6) * (3 * 3),
        ),
        (  # input sizes, filter, gradient of the output -> gradient of the input
            "Conv2DBackpropInput",
            [(4,), (3, 3, 3, 16), (2, 8, 8, 16)],
            (2, 8, 8, 3),
            2 * (2 * 8 * 8 * 16) * (3 * 3 * 3),
        ),
        (  # input, filter sizes, gradient of the output -> gradient of the filter
            "Conv2DBackpropFilter",
            [(2, 8, 8, 3), (4,), (2, 8, 8, 16)],
            (3, 3, 3, 16),
            2 * (2 * 8 * 8 * 16) * (3 * 3 * 3),
        ),
        ("Tanh", [(4, 8)], (4, 8), 32),
        ("Mean", [(4, 8)], (), 1),
        ("Reshape", [None], None, 0),
        ("MatMul", [None, (8, 5)], None, 0),
    ],
)
def test_flops(op, inputs, output, expected):
    assert flops(op, inputs, output) == expected


def test_seconds_are_bound_by_memory_or_arithmetic():
    b = Builder()
    x = b.op("x", "X", shape=(1000, 1000))
    b.op("tanh", "Tanh", x, shape=(1000, 1000))
    b.op("matmul", "MatMul", x, x, shape=(1000, 1000))
    graph = b.build()
    tanh, matmul = (node_seconds(graph, graph.by_name[n]) for n in ("tanh", "matmul"))
    assert tanh == pytest.approx(2 * 4e6 / BYTES_PER_SECOND)
    assert matmul == pytest.approx(2e9 / FLOPS_PER_SECOND)


def test_a_loop_costs_its_rounds_and_a_condition_its_longest_branch():
    inner = Builder()
    x, w = inner.op("x", "Placeholder"), inner.op("w", "Placeholder", shape=SQUARE)
    inner.op("product", "MatMul", x, w)
    short = Builder()
    short.op("sine", "Sin", short.op("y", "Placeholder"))
    body, branch = inner.build(), short.build()
    once = 2 * 4 * 8 * 8
    b = Builder()
    loop = b.op("loop", "While", bodies=(body,), rounds=7)
    b.op("choice", "If", loop, bodies=(branch, body))
    graph = b.build()
    assert node_flops(graph, graph.by_name["loop"]) == 7 * once
    assert node_flops(graph, graph.by_name["choice"]) == once
    seconds = node_seconds(body, body.by_name["product"])
    assert node_seconds(graph, graph.by_name["loop"]) == pytest.approx(7 * seconds)
    nested = dataclasses.replace(graph, nodes=(graph.by_name["loop"],))
    b = Builder()
    b.op("outer", "While", bodies=(nested,), rounds=3)
    graph = b.build()
    assert node_flops(graph, graph.by_name["outer"]) == 21 * once


def test_costs_of_a_chain():
    """Width 8, batch 4: a weight is 256 bytes, an activation 128."""
    step = analyse(chain(2))
    first, last = atom_costs(step.graph, step.roles, step.atoms)
    assert (first.weight_bytes, last.weight_bytes) == (256, 256)
    assert first.gradient_bytes == 256
    assert first.optimizer_bytes == OPTIMIZER_SLOTS * 256
    # Each keeps its tanh (x is an argument, not kept). The first one's is read by the
    # backward of the last as well, and the last one's by two operations: once each.
    assert first.activation_bytes == 128
    assert last.activation_bytes == 128
    assert first.flops >= 2 * (2 * 4 * 8 * 8)  # forward, and dw
    assert last.flops - first.flops >= 2 * 4 * 8 * 8  # dx as well
    assert first.memory_bytes == 256 * 4 + 128
    assert 0 < first.forward_seconds < first.seconds


def test_the_backward_is_split_by_who_waits_for_it():
    """Nobody waits for the first layer's backward; for a middle one's, all but dw."""
    step = analyse(chain(3))
    first, middle, last = atom_costs(step.graph, step.roles, step.atoms)
    assert first.input_gradient_seconds == 0.0 < first.weight_gradient_seconds

    def seconds(*names):
        return sum(node_seconds(step.graph, step.graph.by_name[n]) for n in names)

    dense = "grad/dense_1/"
    assert middle.input_gradient_seconds == pytest.approx(
        seconds(f"{dense}tanh", f"{dense}dx")
    )
    assert middle.weight_gradient_seconds == pytest.approx(seconds(f"{dense}dw"))
    assert last.weight_gradient_seconds == pytest.approx(seconds("grad/dense_2/dw"))
    assert middle.seconds == pytest.approx(
        middle.forward_seconds + middle.backward_seconds
    )


def test_what_a_second_use_keeps_is_kept_shortly():
    """embed -> dense -> head with the embedding's weight: [4, 8] floats each."""
    step = analyse(tied())
    embed, dense = atom_costs(step.graph, step.roles, step.atoms)
    assert embed.late_activation_bytes == 128 > dense.late_activation_bytes == 0
    assert embed.activation_bytes > 0 and dense.activation_bytes > 0
    assert (
        embed.memory_bytes
        - dataclasses.replace(embed, late_activation_bytes=0).memory_bytes
        == 128
    )


def test_variables_that_are_not_trained_have_no_gradient_or_slots():
    b = Builder()
    x, _ = b.dense("d", b.argument("x"), b.variable("w", trainable=False))
    b.returns.append(x)
    step = analyse(b.build())
    (cost,) = atom_costs(step.graph, step.roles, step.atoms)
    assert (cost.weight_bytes, cost.memory_bytes) == (256, 256)


def test_costs_add_by_field():
    one = Cost(1, 2, 3, 4, 5, 6, 7.0, 8.0, 9.0)
    assert one + Cost(10, 20, 30, 40, 50, 60, 70.0, 80.0, 90.0) == Cost(
        11, 22, 33, 44, 55, 66, 77.0, 88.0, 99.0
    )
    assert sum([one, one], Cost()) == Cost(2, 4, 6, 8, 10, 12, 14.0, 16.0, 18.0)
