"""Graphs and functions: trace one, leave them all, call one many times."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2
from tensorflow.core.function.polymorphism import function_type as function_type_lib
from tensorflow.python import pywrap_tfe
from tensorflow.python.autograph.core import ag_ctx
from tensorflow.python.eager import record
from tensorflow.python.eager.polymorphic_function import concrete_function
from tensorflow.python.framework import func_graph as func_graph_lib
from tensorflow.python.framework import smart_cond

_Function = TypeVar("_Function", bound=Callable[..., Any])


@contextlib.contextmanager
def outside_of_graphs() -> Iterator[None]:
    """Leave every enclosing graph, and keep gradient tapes working.

    ``tf.init_scope`` stops all tapes of the thread, also those that are opened inside
    it, and every gradient would silently become None: restart them, and stop them again
    at the end.
    """
    with tf.init_scope():
        is_stopped = pywrap_tfe.TFE_Py_TapeSetIsStopped()
        if is_stopped:
            pywrap_tfe.TFE_Py_TapeSetRestartOnThread()
        try:
            yield
        finally:
            if is_stopped:
                pywrap_tfe.TFE_Py_TapeSetStopOnThread()


@contextlib.contextmanager
def without_tapes() -> Iterator[None]:
    """Keep a call out of every gradient tape: the step has its own gradients inside."""
    with record.stop_recording():
        yield


def unconverted(function: _Function) -> _Function:
    """Decorator: AutoGraph, on its way through a user's code, leaves this as it is."""
    converted: _Function = tf.autograph.experimental.do_not_convert(function)
    return converted


def with_autograph(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` converted by AutoGraph, whatever the state of the caller."""
    status = ag_ctx.ControlStatusCtx(status=ag_ctx.Status.ENABLED)
    return tf.__internal__.autograph.tf_convert(function, status)


def trace_function(
    name: str,
    function: Callable[..., Any],
    specs: Sequence[tf.TypeSpec],
    *,
    control_dependencies: bool = True,
) -> func_graph_lib.FuncGraph:
    """Trace ``function(*specs)`` into one FuncGraph.

    Args:
        control_dependencies: order stateful operations as tf.function does. The emitter
            draws every edge itself and says False: automatic edges would chain all
            sends and receives.
    """
    return func_graph_lib.func_graph_from_py_func(
        name, function, list(specs), {}, add_control_dependencies=control_dependencies
    )


def concrete(graph: func_graph_lib.FuncGraph, **attrs: Any) -> Any:
    """The ConcreteFunction of a FuncGraph; ``graph.control_outputs`` always run."""
    signature = function_type_lib.from_structured_signature(
        graph.structured_input_signature,
        graph.structured_outputs,
        graph.function_captures.capture_types,
    )
    return concrete_function.ConcreteFunction.from_func_graph(graph, signature, attrs)


def keep_functions(source: func_graph_lib.FuncGraph, importer: Any) -> None:
    """Keep the functions that ``source`` calls as long as ``importer``, into which its
    nodes were imported.

    They were imported by name only, and TensorFlow forgets a function with its last
    Python object: that of the traced graph, which nobody else keeps (the gradient of an
    LSTM, say).
    """
    for name, function in source._functions.items():
        if name in importer._functions:
            importer._functions[name] = function


def functions_of(operation: tf.Operation) -> dict[str, func_graph_lib.FuncGraph]:
    """The functions that an operation calls: attribute (with a number where it has
    several) -> graph. Only costs are estimated from them: where TensorFlow does not
    know the graph of one, there are none."""
    known = getattr(operation.graph, "_functions", {})
    found = {}
    for key, value in sorted(operation.node_def.attr.items()):
        called = [value.func] if value.HasField("func") else value.list.func
        for i, function in enumerate(called):
            graph = getattr(known.get(function.name), "graph", None)
            if graph is None:
                return {}
            found[f"{key}{i or ''}"] = graph
    return found


def static_value(tensor: tf.Tensor) -> Any:
    """What TensorFlow can compute from constants and static shapes alone, else None."""
    return smart_cond.smart_constant_value(tensor)


class Calls:
    """Calls of one ConcreteFunction in one graph.

    TensorFlow checks and wraps each input of each call, and infers shapes through the
    whole function again. The second call and those after it repeat the operation and
    the shapes of the first, so that they cost the same whatever is in the function.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._first: tf.Operation | None = None
        self._attributes: dict[str, Any] = {}

    def __call__(self, *inputs: tf.Tensor) -> list[tf.Tensor]:
        if self._first is None:
            outputs: list[tf.Tensor] = list(self._function(*inputs))
            # Types inside a variant or a resource are not part of the operation.
            if not any(t.dtype in (tf.variant, tf.resource) for t in outputs):
                self._first = outputs[0].op
                self._attributes = {
                    **self._first.node_def.attr,
                    "_disable_call_shape_inference": attr_value_pb2.AttrValue(b=True),
                }
            return outputs
        first = self._first
        operation = first.graph._create_op_internal(
            first.type,
            [*inputs, *first.inputs[len(inputs) :]],  # the rest are captures
            [output.dtype for output in first.outputs],
            name=first.name,
            attrs=self._attributes,
            op_def=first.op_def,
        )
        for output, like in zip(operation.outputs, first.outputs, strict=True):
            output.set_shape(like.shape)
        return list(operation.outputs)
