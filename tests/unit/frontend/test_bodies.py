"""Loops, conditions and calls of real steps: what is inside, and how often it runs."""

from collections.abc import Callable
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.plan.cost import node_flops
from smp_tf.plan.graph import Graph, Node

layers = tf.keras.layers
BATCH, STEPS, WIDTH = 8, 20, 32


@pytest.fixture(autouse=True)
def no_session() -> None:
    smp.shutdown()


class Model(smp.DistributedModel):
    """One kernel, and whatever a test does with it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(name="model")
        self.kernel = self.add_weight(name="kernel", shape=[WIDTH, WIDTH])
        self.function = function

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return self.function(x, self.kernel)


def graph_of(model: smp.DistributedModel) -> Graph:
    inputs = tf.zeros([BATCH, STEPS, WIDTH])
    found: Graph = smp.plan(model, inputs, partitions=1, microbatches=1).plan.graph
    return found


def loops(graph: Graph) -> list[Node]:
    found = [node for node in graph.nodes if "While" in node.op]
    assert found
    return found


def flops(graph: Graph, nodes: list[Node]) -> int:
    return sum(node_flops(graph, node) for node in nodes)


PRODUCT = 2 * BATCH * STEPS * WIDTH * WIDTH


def with_range(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    for _ in tf.range(5):
        x = x @ kernel
    return x


def with_limit(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    (x,) = tf.while_loop(
        lambda x: True, lambda x: [x @ kernel], [x], maximum_iterations=5
    )
    return x


def with_two_bounds(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
    _, x = tf.while_loop(
        lambda i, x: i < 9, lambda i, x: [i + 1, x @ kernel], [4, x],
        maximum_iterations=7,
    )  # fmt: skip
    return x


@pytest.mark.parametrize("body", [with_range, with_limit, with_two_bounds])
def test_rounds_of_a_loop_and_of_its_gradient(body: Callable[..., Any]) -> None:
    graph = graph_of(Model(body))
    forward, backward = loops(graph)
    assert forward.rounds == backward.rounds == 5
    assert flops(graph, [forward]) == pytest.approx(5 * PRODUCT, rel=0.02)
    # of the input and of the weight
    assert flops(graph, [backward]) == pytest.approx(2 * 5 * PRODUCT, rel=0.05)


def test_a_loop_of_unknown_length_counts_once() -> None:
    def until_large(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        while tf.reduce_max(x) < 1.0:
            x = x @ kernel + 1.0
        return x

    graph = graph_of(Model(until_large))
    assert [loop.rounds for loop in loops(graph)] == [1, 1]


def test_a_condition_counts_its_longest_branch() -> None:
    def choose(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        if tf.reduce_max(x) > 1.0:
            y = x @ kernel @ kernel
        else:
            y = x @ kernel
        return y

    graph = graph_of(Model(choose))
    forward = [node for node in graph.nodes if "If" in node.op and not node.is_gradient]
    assert flops(graph, forward) == pytest.approx(2 * PRODUCT, rel=0.02)


@pytest.mark.parametrize(("unroll", "gradients"), [(False, 4), (True, 3)])
def test_an_lstm_costs_its_time_steps(unroll: bool, gradients: int) -> None:
    """Four gates, input and state, at each step. The backward has the gradients of two
    weights and the state; the loop makes that of the input too, which nobody needs."""

    class Net(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__(name="net")
            self.cell = layers.LSTM(WIDTH, return_sequences=True, unroll=unroll)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            return self.cell(x)

    graph = graph_of(Net())
    forward = [n for n in graph.nodes if not n.is_gradient and not n.forward]
    backward = [n for n in graph.nodes if n.is_gradient or n.forward]
    gates = 4 * 2 * PRODUCT
    assert flops(graph, forward) == pytest.approx(gates, rel=0.2)
    backward_flops = gradients / 2 * gates
    assert flops(graph, backward) == pytest.approx(backward_flops, rel=0.2)


def test_colocation_reaches_the_graph() -> None:
    def together(x: tf.Tensor, kernel: tf.Tensor) -> tf.Tensor:
        y = tf.matmul(x, kernel, name="anchor")
        with tf.compat.v1.colocate_with(y.op):
            return tf.sin(y, name="beside")

    graph = graph_of(Model(together))
    (beside,) = [node for node in graph.nodes if node.name.endswith("beside")]
    assert [name.rpartition("/")[2] for name in beside.colocated] == ["anchor"]
