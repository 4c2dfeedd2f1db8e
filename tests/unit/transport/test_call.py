"""SmpCall: what it calls behaves as if TensorFlow's own operation had called it."""

import threading
from typing import Any

import pytest
import tensorflow as tf

from smp_tf.frontend.hooks import graphs
from smp_tf.transport import events, ops

ops.load()
SPEC = tf.TensorSpec([2], tf.float32)


def noinline(body: Any, *specs: Any) -> Any:
    function = tf.function(body, experimental_attributes={"_noinline": True})
    return function.get_concrete_function(*specs)


def caller(function: Any, write: Any, *specs: tf.TensorSpec, **marks: int) -> Any:
    """The ConcreteFunction of ``write(call, *arguments)``, in a run of program 3."""

    def body(*values: tf.Tensor) -> Any:
        call = graphs.Calls(function, ops.CALL)
        with tf.control_dependencies([ops.run_begin(3)]):
            results = write(lambda *x: call(*x, **marks), *values)
        with tf.control_dependencies(tf.nest.flatten(results)):
            with tf.control_dependencies([ops.run_end(3, [function.name])]):
                return tf.nest.map_structure(tf.identity, results)

    graph = graphs.trace_function("caller", body, specs, control_dependencies=False)
    graph.control_outputs = [
        op for op in graph.get_operations() if op.type == "SmpRunEnd"
    ]
    return graphs.concrete(graph)


def test_a_call_computes_with_what_the_function_captures() -> None:
    variable = tf.Variable([1.0, 2.0])

    def body(x: tf.Tensor) -> Any:
        text = tf.strings.as_string(tf.cast(x[0], tf.int32))
        (loop,) = tf.while_loop(lambda i: i < 5, lambda i: i + 1, [0])
        return [x * variable, loop, text]

    function = noinline(body, SPEC)
    called = caller(function, lambda call, x: [call(x), call(2 * x)], SPEC)
    (one, loop, text), (two, *_) = called(tf.constant([3.0, 4.0]))
    assert one.numpy().tolist() == [3, 8] and two.numpy().tolist() == [6, 16]
    assert int(loop) == 5 and text.numpy() == b"3"
    variable.assign([10.0, 10.0])
    assert called(tf.constant([3.0, 4.0]))[0][0].numpy().tolist() == [30, 40]


def test_calls_of_a_function_share_the_state_of_its_random_operations() -> None:
    """As one function has one state: no two microbatches get the same mask."""
    function = noinline(lambda x: [x + tf.random.uniform([2], seed=7)], SPEC)
    called = caller(function, lambda call, x: [call(x)[0] for _ in range(4)], SPEC)
    drawn = {tuple(t.numpy()) for t in [*called(tf.zeros([2])), *called(tf.zeros([2]))]}
    assert len(drawn) == 8


def test_errors_come_through_unchanged() -> None:
    function = noinline(lambda x: [tf.debugging.check_numerics(x, "Oops")], SPEC)
    called = caller(function, lambda call, x: call(x), SPEC)
    with pytest.raises(tf.errors.InvalidArgumentError, match="Oops : Tensor had NaN"):
        called(tf.constant([1.0, float("nan")]))
    assert called(tf.ones([2]))[0].numpy().tolist() == [1, 1]


def test_a_call_can_be_cancelled() -> None:
    from tensorflow.python.eager import cancellation

    queue = tf.queue.FIFOQueue(1, [tf.float32])
    function = noinline(lambda x: [x + queue.dequeue()], SPEC)
    called = caller(function, lambda call, x: call(x), SPEC)
    manager = cancellation.CancellationManager()
    threading.Timer(0.3, manager.start_cancel).start()
    with pytest.raises(tf.errors.CancelledError):
        manager.get_cancelable_function(called)(tf.ones([2]))


def test_it_works_inlined_in_a_loop_of_another_function() -> None:
    function = noinline(lambda x: [x + 1.0], SPEC)
    called = caller(function, lambda call, x: call(*call(x)), SPEC)

    @tf.function
    def outer(x: tf.Tensor) -> tf.Tensor:
        for _ in tf.range(3):
            x = called(x)[0]
        return x

    assert outer(tf.zeros([2])).numpy().tolist() == [6, 6]


def test_a_function_that_is_not_there_is_named() -> None:
    graph = tf.Graph()
    with graph.as_default():
        function = noinline(lambda x: [x + 1.0], SPEC)
        (output,) = graphs.Calls(function, ops.CALL)(tf.ones([2]))
        output.op._set_attr("function", tf.compat.v1.AttrValue(s=b"no_such"))
        with pytest.raises(tf.errors.NotFoundError, match="no_such"):
            tf.compat.v1.Session().run(output)


def test_recorded_calls_are_events_of_the_last_run() -> None:
    function = noinline(lambda x: [x + 1.0], SPEC)
    marked = caller(function, lambda call, x: call(x), SPEC, program=3, event=5)
    unmarked = caller(function, lambda call, x: call(x), SPEC)
    events.keep(1000)
    try:
        unmarked(tf.ones([2]))
        assert [e.event for e in events.last()] == [events.RUN_BEGIN, events.RUN_END]
        marked(tf.ones([2]))
        begin, call, end = events.last()
        assert (call.program, call.event, call.bytes) == (3, 5, 0)
        assert begin.run == call.run == end.run
        assert begin.end_ns <= call.start_ns < call.end_ns <= end.start_ns
        assert len(events.take()) == 5
        assert events.take() == [] and events.dropped() == 0
    finally:
        events.keep(0)
