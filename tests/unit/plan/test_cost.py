"""The cost model against numbers worked out by hand."""

import pytest

from smp_tf.plan.cost import (
    BYTES_PER_SECOND,
    FLOPS_PER_SECOND,
    OPTIMIZER_SLOTS,
    Cost,
    atom_costs,
    loads,
    node_flops,
    node_seconds,
)
from tests.unit.plan.example_graphs import Builder, analyse, chain


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


def test_costs_of_a_chain():
    """Width 8, batch 4: a weight is 256 bytes, an activation 128."""
    step = analyse(chain(2))
    first, last = atom_costs(step.graph, step.roles, step.atoms)
    assert (first.weight_bytes, last.weight_bytes) == (256, 256)
    assert first.gradient_bytes == 256
    assert first.optimizer_bytes == OPTIMIZER_SLOTS * 256
    # the first keeps its tanh (x is an argument, not kept); the last keeps its tanh,
    # read by two operations but kept once, and its input
    assert first.activation_bytes == 128
    assert last.activation_bytes == 256
    assert first.flops >= 2 * (2 * 4 * 8 * 8)  # forward, and dw
    assert last.flops - first.flops >= 2 * 4 * 8 * 8  # dx as well
    assert first.memory_bytes == 256 * 4 + 128
    assert 0 < first.forward_seconds < first.seconds


def test_variables_that_are_not_trained_have_no_gradient_or_slots():
    b = Builder()
    x, _ = b.dense("d", b.argument("x"), b.variable("w", trainable=False))
    b.returns.append(x)
    step = analyse(b.build())
    (cost,) = atom_costs(step.graph, step.roles, step.atoms)
    assert (cost.weight_bytes, cost.memory_bytes) == (256, 256)


def test_costs_add_by_field():
    one = Cost(1, 2, 3, 4, 5, 6.0, 7.0)
    assert one + Cost(10, 20, 30, 40, 50, 60.0, 70.0) == Cost(
        11, 22, 33, 44, 55, 66.0, 77.0
    )
    assert sum([one, one], Cost()) == Cost(2, 4, 6, 8, 10, 12.0, 14.0)


def test_loads_weigh_memory_against_time():
    costs = [Cost(weight_bytes=300, forward_seconds=1.0), Cost(100, forward_seconds=3)]
    assert loads(costs, 1.0) == pytest.approx((0.75, 0.25))
    assert loads(costs, 0.0) == pytest.approx((0.25, 0.75))
    assert loads(costs, 0.5) == pytest.approx((0.5, 0.5))
    assert loads([Cost(), Cost()], 0.5) == (0.0, 0.0)
