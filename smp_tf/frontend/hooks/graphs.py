"""Graphs and functions: trace one, leave them all, call one many times."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2
from tensorflow.core.function.polymorphism import function_type as function_type_lib
from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2
from tensorflow.python import pywrap_tfe
from tensorflow.python.autograph.core import ag_ctx
from tensorflow.python.eager import record
from tensorflow.python.eager.polymorphic_function import concrete_function
from tensorflow.python.framework import func_graph as func_graph_lib
from tensorflow.python.framework import smart_cond
from tensorflow.python.ops import handle_data_util

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
    whole function again. So the function is called once, in a graph of its own, and
    every call repeats that operation and its shapes: it costs the same whatever is in
    the function.

    Args:
        operation: type of the operation that calls. If said, it is like TensorFlow's
            own, but has the name of the function in place of the function.
        without: fields of RewriterConfig: what must not optimize the function.
    """

    def __init__(
        self, function: Any, operation: str = "", without: Sequence[str] = ()
    ) -> None:
        self._function = function
        self._type = operation
        self._without = without
        self._likes: list[tf.Tensor] = []
        self._attributes: dict[str, Any] = {}

    def __call__(self, *inputs: tf.Tensor, **attributes: int) -> list[tf.Tensor]:
        """The outputs of a new call; ``attributes`` are more ones of its operation."""
        graph = tf.compat.v1.get_default_graph()
        if not self._likes:
            self._prepare(graph, inputs)
        more = {key: attr_value_pb2.AttrValue(i=i) for key, i in attributes.items()}
        operation = graph._create_op_internal(
            self._type,
            [*inputs, *self._function.captured_inputs],
            [like.dtype for like in self._likes],
            name=self._type,
            attrs={**self._attributes, **more},
        )
        outputs = list(operation.outputs)
        for output, like in zip(outputs, self._likes, strict=True):
            output.set_shape(like.shape)
            handle_data_util.copy_handle_data(like, output)
        return outputs

    def _prepare(self, graph: Any, inputs: Sequence[tf.Tensor]) -> None:
        self._function.add_to_graph(graph)
        with func_graph_lib.FuncGraph("call").as_default():
            given = [tf.compat.v1.placeholder(x.dtype, x.shape) for x in inputs]
            self._likes = list(self._function(*given))
        call = self._likes[0].op
        self._attributes = {
            **call.node_def.attr,
            "_disable_call_shape_inference": attr_value_pb2.AttrValue(b=True),
        }
        if self._without:
            self._attributes["config_proto"] = self._config()
        if self._type:
            name = self._attributes.pop("f").func.name
            self._attributes["function"] = attr_value_pb2.AttrValue(s=name.encode())
        self._type = self._type or call.type

    def _config(self) -> Any:
        """What the call has, a ConfigProto, without some of the optimizers."""
        config = config_pb2.ConfigProto.FromString(self._attributes["config_proto"].s)
        options = config.graph_options.rewrite_options
        for name in self._without:
            setattr(options, name, rewriter_config_pb2.RewriterConfig.OFF)
        return attr_value_pb2.AttrValue(s=config.SerializeToString())
