"""A counter in a variable gives the numbers of TensorFlow's kernels, bit for bit."""

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

from smp_tf.runtime.counted_draws import STATELESS, CountedDraws

FLOATS = ("float16", "bfloat16", "float32", "float64")
SHAPES = ([1], [3], [257], [100003], [], [0], [5, 7])
SEEDS = ((7, 11), (0, 3), (5, 0), (-4, -9), (2**40 + 3, 2**62 + 5))


def draw(kind: str, dtype: str, shape: Any, seeds: tuple[int, int]) -> tf.Tensor:
    if kind == "RandomUniformInt":
        low, high = tf.constant(-5, dtype), tf.constant(1000003, dtype)
        return tf.raw_ops.RandomUniformInt(
            shape=shape, minval=low, maxval=high, seed=seeds[0], seed2=seeds[1]
        )
    function = getattr(tf.raw_ops, kind)
    return function(shape=shape, dtype=dtype, seed=seeds[0], seed2=seeds[1])


def both(
    function: Callable[..., Any], *specs: tf.TensorSpec
) -> tuple[Any, Any, dict[str, tf.Variable]]:
    """(the function, with counters instead, the counters)"""
    truth = tf.function(function, autograph=False).get_concrete_function(*specs)
    made: dict[str, tf.Variable] = {}

    def counter(operation: str, *seeds: int) -> tf.Variable:
        made[operation] = tf.Variable([0, seeds[1], seeds[0]], dtype=tf.int64)
        return made[operation]

    graph_def = truth.graph.as_graph_def()
    names = [tensor.name for tensor in truth.graph.outputs]
    fed = [tensor.name for tensor in truth.graph.inputs]
    counters = CountedDraws(truth.graph, counter).replace(graph_def)

    def counted(*values: tf.Tensor) -> Any:
        here = tf.compat.v1.get_default_graph()
        feeds = dict(zip(fed, values))
        feeds.update((name, here.capture(c.handle)) for name, c in counters.items())
        return tf.graph_util.import_graph_def(graph_def, feeds, names, name="")

    ours = tf.function(counted, autograph=False).get_concrete_function(*specs)
    assert not {op.type for op in ours.graph.get_operations()} & STATELESS.keys()
    return truth, ours, made


def assert_same_bits(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert a.numpy().tobytes() == b.numpy().tobytes()


def test_the_same_numbers_in_each_of_several_calls() -> None:
    kinds = [each for each in STATELESS if each != "RandomUniformInt"]
    cases = [*itertools.product(kinds, FLOATS, SHAPES)]
    cases += itertools.product(["RandomUniformInt"], ["int32", "int64"], SHAPES)
    seeds = itertools.cycle(SEEDS)  # 5 of them, 7 shapes: all combinations come

    def function() -> Any:
        return [
            draw(kind, dtype, tf.constant(shape, tf.int32), next(seeds))
            for kind, dtype, shape in cases
        ]

    truth, ours, counters = both(function)
    assert len(counters) == len(cases)
    for _ in range(4):
        assert_same_bits(ours(), truth())


def test_shapes_that_are_known_at_run_time() -> None:
    def function(shape: tf.Tensor, rows: tf.Tensor) -> Any:
        return [
            draw("RandomUniform", "float32", shape, (1, 2)),
            draw("TruncatedNormal", "bfloat16", tf.stack([rows, 3]), (1, 2)),
            draw("RandomUniformInt", "int64", shape[1:], (1, 2)),
        ]

    specs = tf.TensorSpec([None], tf.int64), tf.TensorSpec([], tf.int32)
    truth, ours, _ = both(function, *specs)
    for shape, rows in (([5, 9], 4), ([300, 7], 0), ([2, 3, 4], 999), ([1], 1)):
        given = tf.constant(shape, tf.int64), tf.constant(rows)
        assert_same_bits(ours(*given), truth(*given))


def test_a_counter_is_all_there_is_to_know() -> None:
    _, ours, counters = both(lambda: [draw("RandomUniform", "float32", [9], (3, 4))])
    ours()
    kept = {name: counter.numpy() for name, counter in counters.items()}
    np.testing.assert_equal(kept, {"0 RandomUniform": [9 * 256, 4, 3]})
    following = [ours() for _ in range(3)]
    for name, counter in counters.items():
        counter.assign(kept[name])
    for expected in following:
        assert_same_bits(ours(), expected)


def test_what_comes_before_a_drawing_still_does() -> None:
    count = tf.Variable(0)

    def function() -> Any:
        shape = tf.constant([2])
        with tf.control_dependencies([count.assign_add(1)]):
            return [draw("RandomUniform", "float32", shape, (3, 4))]

    graph = tf.function(function).get_concrete_function().graph
    graph_def = graph.as_graph_def()
    first = next(n.input[-1] for n in graph_def.node if n.op == "RandomUniform")
    assert first.startswith("^")
    CountedDraws(graph, lambda *_: count).replace(graph_def)
    after = {node.op for node in graph_def.node if first in node.input}
    assert {"RngReadAndSkip", "StatelessRandomUniformV2"} <= after


def test_what_is_inside_of_a_function_stays() -> None:
    inner = tf.function(lambda: draw("RandomUniform", "float32", [2], (3, 4)))
    graph = tf.function(lambda: inner()).get_concrete_function().graph
    graph_def = graph.as_graph_def()
    before = graph_def.SerializeToString(deterministic=True)
    assert CountedDraws(graph, lambda *_: tf.Variable(0)).replace(graph_def) == {}
    assert graph_def.SerializeToString(deterministic=True) == before
