"""What draws random numbers is found, and both parts make the whole again."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from smp_tf.errors import SmpError
from smp_tf.runtime import random_part

X = tf.TensorSpec([4, 3])


def traced(function: Callable[..., Any], *specs: tf.TensorSpec) -> tuple[Any, Any]:
    """(FuncGraph, GraphDef)."""
    graph = tf.function(function, autograph=False).get_concrete_function(*specs).graph
    return graph, graph.as_graph_def()


def types(part: random_part.RandomPart, graph: Any) -> set[str]:
    return {graph.get_operation_by_name(name).type for name in part.nodes}


def test_nothing_is_drawn() -> None:
    part = random_part.find_random_part(*traced(tf.tanh, X))
    assert (part.nodes, part.constants, part.drawn) == (frozenset(), {}, ())


def test_of_dropout_only_the_numbers() -> None:
    graph, graph_def = traced(lambda x: tf.nn.dropout(tf.tanh(x), 0.5), X)
    part = random_part.find_random_part(graph, graph_def)
    assert types(part, graph) == {"RandomUniform"}
    assert [value.tolist() for value in part.constants.values()] == [[4, 3]]
    assert [tensor.shape for tensor in part.drawn] == [X.shape]


def test_of_a_generator_also_its_state() -> None:
    generator = tf.random.Generator.from_seed(1)
    graph, graph_def = traced(lambda x: x + generator.uniform([3]), X)
    part = random_part.find_random_part(graph, graph_def)
    assert {"RngReadAndSkip", "StatelessRandomUniformV2"} <= types(part, graph)
    assert "AddV2" not in types(part, graph)


def test_a_drawing_may_use_an_input_of_the_function() -> None:
    graph, graph_def = traced(lambda x: tf.random.categorical(x, 2), X)
    part = random_part.find_random_part(graph, graph_def)
    assert types(part, graph) == {"Multinomial"}


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (
            lambda x: tf.random.categorical(tf.tanh(x), 2),
            r"Tanh \(Tanh\) computes from what random numbers are drawn",
        ),
        (
            lambda x: tf.cond(x[0, 0] > 0, lambda: tf.nn.dropout(x, 0.5), lambda: x),
            r"cond \(If\) draws random numbers \(RandomUniform\) inside of a function",
        ),
    ],
)
def test_what_cannot_be_taken_out(function: Callable[..., Any], said: str) -> None:
    with pytest.raises(SmpError, match=said):
        random_part.find_random_part(*traced(function, X))


def test_both_parts_make_the_whole() -> None:
    state, weight = tf.Variable(0), tf.Variable(tf.ones([3]))

    def function(x: tf.Tensor) -> tf.Tensor:
        seed = tf.stack([state.assign_add(1), 5])
        return x * weight + tf.random.stateless_normal([4, 3], seed)

    graph, graph_def = traced(function, X)
    part = random_part.find_random_part(graph, graph_def)
    run = random_part.importer(graph, graph_def)
    outputs = [tensor.name for tensor in graph.outputs]
    drawn = [tensor.name for tensor in part.drawn]

    @tf.function
    def again(x: tf.Tensor) -> Any:
        constants = {name: tf.constant(value) for name, value in part.constants.items()}
        made = run(part.nodes.__contains__, constants, drawn)
        feeds = {graph.inputs[0].name: x, **dict(zip(drawn, made))}
        return run(lambda name: name not in part.nodes, feeds, outputs)[0]

    x = tf.constant(np.arange(12, dtype="f").reshape(4, 3))
    found = [again(x).numpy() for _ in range(2)]
    state.assign(0)
    assert np.array_equal(found, [function(x).numpy() for _ in range(2)])
    assert not np.array_equal(*found)
