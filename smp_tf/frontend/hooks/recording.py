"""What each operation of a step remembers of the moment it was traced.

While a step is traced, places of TensorFlow and Keras are wrapped so that each
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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import attr_value_pb2
from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import backprop, execute, record
from tensorflow.python.eager.polymorphic_function import (
    function_type_utils,
    polymorphic_function,
)
from tensorflow.python.framework import ops
from tensorflow.python.ops import gradients_util

from smp_tf.errors import TraceError
from smp_tf.frontend.hooks.graphs import unconverted, with_autograph

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


_active: Recorder | None = None


def is_tracing() -> bool:
    """True while a step is traced."""
    return _active is not None


def is_step(graph: Any) -> bool:
    """Whether ``graph`` is the one that the step is being traced into."""
    return _active is not None and graph is _active.graph


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
