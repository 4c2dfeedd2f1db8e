"""Every private TensorFlow hook of the library, and a self-test of each.

While a step is traced, four places of TensorFlow and Keras are wrapped so that each
operation remembers, as attributes of its NodeDef, what the finished graph can no longer
tell:

===================  ============================================================
attribute            meaning
===================  ============================================================
``_smp_forward``     name of the forward operation a gradient operation belongs to
``_smp_gradient``    made while differentiating
``_smp_layer``       path of Keras layers the operation was created in
``_smp_partition``   partition asked for with ``smp.partition``
===================  ============================================================

Guessing the first one from the finished graph's structure is right for only 48..97 % of
the operations (worst for tied weights and convolutions), so it is recorded instead. The
wrappers are in place only inside ``tracing``; outside, TensorFlow is untouched.
"""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2
from tensorflow.core.function.polymorphism import function_type as function_type_lib
from tensorflow.core.protobuf import config_pb2
from tensorflow.python import pywrap_tfe
from tensorflow.python.autograph.core import ag_ctx
from tensorflow.python.eager import backprop, context, execute, record
from tensorflow.python.eager.polymorphic_function import (
    concrete_function,
    function_type_utils,
    polymorphic_function,
)
from tensorflow.python.framework import func_graph as func_graph_lib
from tensorflow.python.framework import ops, random_seed
from tensorflow.python.ops import gradients_util, resource_variable_ops
from tensorflow.python.trackable import base as trackable
from tf_keras.src import backend as keras_backend

from smp_tf.errors import TraceError

KNOWN_VERSIONS = "2.18 to 2.21"

FORWARD = "_smp_forward"
GRADIENT = "_smp_gradient"
LAYER = "_smp_layer"
PARTITION = "_smp_partition"
ATTRIBUTES = (FORWARD, GRADIENT, LAYER, PARTITION)

DISTRIBUTED_MARK = "_smp_is_distributed"
"""Attribute that a DistributedModel carries, so that this module need not import it."""


@dataclasses.dataclass
class Recorder:
    """What happened while one step was traced.

    Attributes:
        graph: the step's FuncGraph, once it exists.
        models: distributed models that were called, in order of their first call.
        losses: tensors that were differentiated.
        gradients: (sources, results) of every gradient call, flattened, aligned.
    """

    graph: tf.Graph | None = None
    models: list[Any] = dataclasses.field(default_factory=list)
    losses: list[tf.Tensor] = dataclasses.field(default_factory=list)
    gradients: list[tuple[list[Any], list[Any]]] = dataclasses.field(
        default_factory=list
    )
    layer_path: tuple[str, ...] = ()

    def is_current(self) -> bool:
        """True while operations go into the step's own graph, not a nested one."""
        return self.graph is not None and ops.get_default_graph() is self.graph

    def record_gradient_call(self, targets: Any, sources: Any, results: Any) -> None:
        self.losses += [t for t in _flatten(targets) if tf.is_tensor(t)]
        self.gradients.append((_flatten(sources), _flatten(results)))


_Function = TypeVar("_Function", bound=Callable[..., Any])

_active: Recorder | None = None


def is_tracing() -> bool:
    """True while a step is traced."""
    return _active is not None


def _flatten(structure: Any) -> list[Any]:
    return tf.nest.flatten(structure)


def _current() -> Recorder | None:
    return _active if _active is not None and _active.is_current() else None


@contextlib.contextmanager
def attributes(**values: str | int) -> Iterator[None]:
    """Give every operation created inside these attributes."""
    encoded = {
        key: (
            attr_value_pb2.AttrValue(i=value)
            if isinstance(value, int)
            else attr_value_pb2.AttrValue(s=value.encode())
        )
        for key, value in values.items()
    }
    with ops.get_default_graph()._attr_scope(encoded):
        yield


def read_attribute(node_def: Any, key: str) -> str:
    """Text attribute of a NodeDef, "" where it is missing."""
    return node_def.attr[key].s.decode() if key in node_def.attr else ""


# --- the wrappers; each takes the original and returns its replacement ----------------


def _record_gradient(original: Callable[..., None]) -> Callable[..., None]:
    """The tape remembers an operation: add its name to the attributes that it keeps."""

    def record_gradient(op_name, inputs, attrs, outputs):
        if _current() is not None and len(outputs):
            attrs = tuple(attrs or ()) + (FORWARD, outputs[0].op.name)
        return original(op_name, inputs, attrs, outputs)

    return record_gradient


def _gradient_function(original: Callable[..., Any]) -> Callable[..., Any]:
    """The tape asks for the gradient of an operation: take the name off again."""

    def gradient_function(op_name, attrs, *args):
        if not attrs or len(attrs) < 2 or attrs[-2] != FORWARD:
            return original(op_name, attrs, *args)
        forward, attrs = attrs[-1], attrs[:-2]
        if _current() is None:
            return original(op_name, attrs, *args)
        with attributes(**{FORWARD: forward}):
            return original(op_name, attrs, *args)

    return gradient_function


def _backward_of_call(outputs: Any, backward: Any) -> Any:
    """Calls (tf.function, While, custom_gradient) bring their own backward function."""
    if _current() is None or backward is None:
        return backward
    symbolic = [
        t for t in _flatten(outputs) if isinstance(t, tf.Tensor) and hasattr(t, "graph")
    ]
    if not symbolic:
        return backward
    forward = symbolic[0].op.name

    def backward_function(*args, **kwargs):
        if _current() is None:
            return backward(*args, **kwargs)
        with attributes(**{FORWARD: forward}):
            return backward(*args, **kwargs)

    return backward_function


def _record_operation(original: Callable[..., None]) -> Callable[..., None]:
    def record_operation(
        op_type, output_tensors, input_tensors, backward_function, *args, **kwargs
    ):
        backward_function = _backward_of_call(output_tensors, backward_function)
        return original(
            op_type, output_tensors, input_tensors, backward_function, *args, **kwargs
        )

    return record_operation


def _colocate(original: Callable[..., Any]) -> Callable[..., Any]:
    """tf.gradients enters this context for each forward operation it differentiates."""

    @contextlib.contextmanager
    def maybe_colocate_with(op, *args):
        with original(op, *args):
            if _current() is None:
                yield
            else:
                with attributes(**{FORWARD: op.name}):
                    yield

    return maybe_colocate_with


def _tape_gradient(original: Callable[..., Any]) -> Callable[..., Any]:
    def gradient(tape, target, sources, *args, **kwargs):
        recorder = _current()
        if recorder is None:
            return original(tape, target, sources, *args, **kwargs)
        with attributes(**{GRADIENT: 1}):
            results = original(tape, target, sources, *args, **kwargs)
        recorder.record_gradient_call(target, sources, results)
        return results

    return gradient


def _graph_gradients(original: Callable[..., Any]) -> Callable[..., Any]:
    def gradients_helper(ys, xs, *args, **kwargs):
        recorder = _current()
        if recorder is None:
            return original(ys, xs, *args, **kwargs)
        with attributes(**{GRADIENT: 1}):
            results = original(ys, xs, *args, **kwargs)
        recorder.record_gradient_call(ys, xs, results)
        return results

    return gradients_helper


def _layer_call(original: Callable[..., Any]) -> Callable[..., Any]:
    def layer_call(layer, *args, **kwargs):
        recorder = _current()
        is_root = getattr(layer, DISTRIBUTED_MARK, False)
        if recorder is None or not (recorder.layer_path or is_root):
            return original(layer, *args, **kwargs)
        if is_root and not any(layer is model for model in recorder.models):
            recorder.models.append(layer)
        outer = recorder.layer_path
        recorder.layer_path = (*outer, layer.name)
        try:
            with attributes(**{LAYER: "/".join(recorder.layer_path)}):
                return original(layer, *args, **kwargs)
        finally:
            recorder.layer_path = outer

    return layer_call


_LIBRARIES = ("tensorflow", "tf_keras", "keras")


def _function_call(original: Callable[..., Any]) -> Callable[..., Any]:
    """A user's tf.function inside the model is traced into the step's own graph, so
    that it can be cut inside; as one call operation it would be one atom."""

    def call(function, *args, **kwargs):
        recorder = _current()
        if recorder is None or not recorder.layer_path or not _is_open(function):
            return original(function, *args, **kwargs)
        bound = function_type_utils.canonicalize_function_inputs(
            args, kwargs, function.function_type, function._default_values
        )
        body = function.python_function
        body = with_autograph(body) if function._autograph else body
        return body(*bound.args, **bound.kwargs)

    return unconverted(call)


def _is_open(function: Any) -> bool:
    """True if it is all the same whether the function is called or written out."""
    module = getattr(function.python_function, "__module__", None) or ""
    is_library = module.partition(".")[0] in _LIBRARIES
    return not (is_library or function._jit_compile or function._attributes)


_PLACES: Sequence[tuple[Any, str, Callable[[Any], Any]]] = (
    (execute, "record_gradient", _record_gradient),
    (record, "record_operation", _record_operation),
    (record, "record_operation_backprop_only", _record_operation),
    (gradients_util, "_maybe_colocate_with", _colocate),
    (gradients_util, "_GradientsHelper", _graph_gradients),
    (tf.GradientTape, "gradient", _tape_gradient),
    (tf.keras.layers.Layer, "__call__", _layer_call),
    (polymorphic_function.Function, "__call__", _function_call),
)


@contextlib.contextmanager
def tracing(recorder: Recorder) -> Iterator[None]:
    """Record into ``recorder`` what is traced inside."""
    global _active
    if _active is not None:
        raise TraceError("a step must not be called while another step is traced")
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in _PLACES]
    for owner, name, wrapper in _PLACES:
        setattr(owner, name, wrapper(getattr(owner, name)))
    pywrap_tfe.TFE_Py_RegisterGradientFunction(
        _gradient_function(backprop._gradient_function)
    )
    _active = recorder
    try:
        yield
    finally:
        _active = None
        pywrap_tfe.TFE_Py_RegisterGradientFunction(backprop._gradient_function)
        for owner, name, original in originals:
            setattr(owner, name, original)


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


# --- variables whose initializer runs later -------------------------------------------

UninitializedVariable = resource_variable_ops.UninitializedVariable
ResourceVariable = resource_variable_ops.ResourceVariable
CheckpointInitialValueCallable = trackable.CheckpointInitialValueCallable

INITIAL_VALUE = "smp_initial_value"  # name of the graph of an initializer

# Graphs that Keras traces for shapes only, by the end of their names.
_SCRATCH_GRAPHS = ("_scratch_graph", "keras_graph", "build_graph")


def is_read_later() -> bool:
    """True where reading a variable only writes a node: in the step's own graph, which
    runs after partitioning, and in Keras's scratch graphs, which never run."""
    graph = ops.get_default_graph()  # tf.init_scope keeps it
    while isinstance(graph, func_graph_lib.FuncGraph) and not tf.executing_eagerly():
        if graph.name == INITIAL_VALUE:
            return False
        if _active is not None and graph is _active.graph:
            return True
        if graph.name.endswith(_SCRATCH_GRAPHS):
            return True
        graph = graph.outer_graph
    return False


def variable_of(handle: Any) -> Any:
    """The variable object that a resource handle was made for, None if unknown."""
    parent = getattr(handle, "_parent_trackable", None)
    return None if parent is None else parent()


def assign_raw(variable: Any, value: Any) -> None:
    """Set the resource to any value, of any shape."""
    with tf.device(variable.handle.device):
        tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)


class ExplicitSeedError(Exception):
    """An operation with state and its own seed: each run gives other numbers."""


@contextlib.contextmanager
def eager_seeds() -> Iterator[list[tuple[int, int]]]:
    """Let random operations of the graph traced inside have the seeds that they would
    draw when run eagerly here; yields the list of them.

    Raises:
        ExplicitSeedError: from the operation, inside.
    """
    original = random_seed.get_seed
    outer = ops.get_default_graph()
    drawn: list[tuple[int, int]] = []

    def get_seed(op_seed: int | None) -> Any:
        here = ops.get_default_graph()
        if here is outer or getattr(here, "outer_graph", None) is not outer:
            return original(op_seed)
        if op_seed is not None:
            raise ExplicitSeedError(op_seed)
        with tf.init_scope():
            seeds = original(None)
        drawn.append((seeds[0] or 0, seeds[1] or 0))
        return seeds

    random_seed.get_seed = get_seed
    try:
        yield drawn
    finally:
        random_seed.get_seed = original


class RandomState:
    """The state of every generator that initializers draw seeds or numbers from."""

    def __init__(self) -> None:
        self._eager = getattr(context.context(), "_rng", None)  # once seeded
        self._keras = getattr(keras_backend._SEED_GENERATOR, "generator", None)
        self._eager_state = self._eager.getstate() if self._eager else None
        self._keras_state = self._keras.getstate() if self._keras else None
        self._python_state = random.getstate()
        self._numpy_state = np.random.get_state()

    def restore(self) -> None:
        if self._eager:
            self._eager.setstate(self._eager_state)
        if self._keras:
            self._keras.setstate(self._keras_state)
        random.setstate(self._python_state)
        np.random.set_state(self._numpy_state)

    def is_keras_state_of(self, other: "RandomState") -> bool:
        return self._keras_state == other._keras_state

    def restore_keras(self) -> None:
        if self._keras:
            self._keras.setstate(self._keras_state)


def run_as_written(graph: func_graph_lib.FuncGraph) -> tf.Tensor:
    """Run a graph of one output without any rewriting: bit for bit as eagerly."""
    options = config_pb2.ConfigProto()
    options.graph_options.rewrite_options.disable_meta_optimizer = True
    options.graph_options.optimizer_options.opt_level = (
        config_pb2.OptimizerOptions.Level.L0
    )
    current = context.context()
    kept = current.function_call_options
    current.function_call_options = context.FunctionCallOptions(
        kept.executor_type, options
    )
    try:
        return concrete(graph)()
    finally:
        current.function_call_options = kept


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
            [*inputs, *first.inputs[len(inputs):]],  # the rest are captures
            [output.dtype for output in first.outputs],
            name=first.name,
            attrs=self._attributes,
            op_def=first.op_def,
        )
        for output, like in zip(operation.outputs, first.outputs, strict=True):
            output.set_shape(like.shape)
        return list(operation.outputs)


# --- self-test ------------------------------------------------------------------------

_is_probed = False


def probe() -> None:
    """Check once, on a small model, that every hook does what this library needs.

    Raises:
        TraceError: names the hook, this TensorFlow and the versions known to work.
    """
    global _is_probed
    if _is_probed:
        return
    failure = _probe()
    if failure:
        raise TraceError(
            f"a private TensorFlow hook does not behave as expected: {failure};"
            f" tensorflow={tf.__version__}, known to work: {KNOWN_VERSIONS}"
        )
    _is_probed = True


def _probe() -> str:
    """ "" or the name of the first hook that does not work."""

    class Probe(tf.keras.layers.Layer):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            return tf.sin(x, name="probed_sine")

    layer = Probe(name="probe", autocast=False)
    setattr(layer, DISTRIBUTED_MARK, True)
    recorder = Recorder()

    def function(x: tf.Tensor) -> list[tf.Tensor]:
        recorder.graph = ops.get_default_graph()
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        by_tape = tape.gradient(y, x)
        return [by_tape, *tf.gradients(y, x)]

    try:
        with outside_of_graphs(), tracing(recorder):
            graph = trace_function("probe", function, [tf.TensorSpec([2], tf.float32)])
    except (AttributeError, TypeError) as error:
        return f"{type(error).__name__}: {error}"
    nodes = {node.name: node for node in graph.as_graph_def().node}
    sine = next((node for node in nodes.values() if node.op == "Sin"), None)
    cosines = [node for node in nodes.values() if node.op == "Cos"]
    if sine is None or read_attribute(sine, LAYER) != "probe":
        return "Layer.__call__ does not mark the operations of a layer"
    if len(recorder.losses) != 2 or len(recorder.gradients) != 2:
        return "GradientTape.gradient or tf.gradients does not report its call"
    if len(cosines) != 2 or any(GRADIENT not in node.attr for node in cosines):
        return "gradient operations are not marked"
    if any(read_attribute(node, FORWARD) != sine.name for node in cosines):
        return "gradient operations do not know their forward operation"
    return ""
