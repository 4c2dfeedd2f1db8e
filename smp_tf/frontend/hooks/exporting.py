"""What a SavedModel of a model needs of TensorFlow and Keras."""

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.saved_model import fingerprinting_utils
from tf_keras.src.engine import training

from smp_tf.frontend.hooks import tracking
from smp_tf.frontend.hooks.graphs import with_autograph

OWN_OPERATIONS = "Smp"
"""How the names of the operations begin that only this library knows."""

_SPECS = ("_saved_model_inputs_spec", "_saved_model_arg_spec")


@contextlib.contextmanager
def called_with(model: Any, arguments: Sequence[Any]) -> Iterator[None]:
    """Inside, a SavedModel of the Keras model takes these arguments.

    Args:
        arguments: structures of TensorSpecs, one for each positional argument of
            ``call``; whatever the model was called with before.
    """
    held = {name: vars(model)[name] for name in _SPECS if name in vars(model)}
    try:
        # Set past Keras, which would track it as part of the model.
        object.__setattr__(model, "_saved_model_inputs_spec", None)
        model._set_save_spec(arguments[0], list(arguments[1:]), {})
        yield
    finally:
        for name, value in held.items():
            object.__setattr__(model, name, value)


def users_layers(model: Any) -> list[Any]:
    """The model and layers in it that are more than Keras's own."""
    return [
        layer
        for layer in (model, *model.submodules)
        if isinstance(layer, tf.keras.Model)
        or isinstance(layer, tf.keras.layers.Layer)
        and layer._should_use_autograph()
    ]


@contextlib.contextmanager
def converted_call(layer: Any) -> Iterator[None]:
    """Inside, AutoGraph converts ``call`` of the layer, which Keras leaves out when it
    traces layers one by one: ``if`` and ``for`` over tensors are as in a step."""
    if not layer._should_use_autograph():
        yield
        return
    own, call = vars(layer), layer.call
    held = own.get("call")
    # Set past Keras, which would track it as part of the model.
    own["call"] = with_autograph(getattr(call, "python_function", call))
    try:
        yield
    finally:
        own["call"] = held
        if held is None:
            del own["call"]


@contextlib.contextmanager
def without_functions_of_ranks(layer: Any) -> Iterator[None]:
    """Inside, attributes of the layer that are ``tf.function``s and run with other
    ranks, as those that call a step, are None: Keras would trace them again."""
    names = [
        name
        for name in dir(layer)
        if _is_function(inspect.getattr_static(layer, name, None))
        and needs_ranks(getattr(layer, name))
    ]
    with tracking.without_attributes(layer, names, is_reading=False):
        yield


def _is_function(value: Any) -> bool:
    return isinstance(value, tf.types.experimental.PolymorphicFunction)


def needs_ranks(child: Any) -> bool:
    """Whether an object is a ``tf.function``, or a trace of one, that runs with other
    ranks."""
    traces = []
    if isinstance(child, tf.types.experimental.ConcreteFunction):
        traces = [child]
    elif _is_function(child):
        # TensorFlow's method that lists them would trace it again.
        traces = child._function_cache.values()
    return any(
        node.op.startswith(OWN_OPERATIONS)
        for trace in traces
        for nodes in _bodies(trace.graph.as_graph_def())
        for node in nodes
    )


def _bodies(graph_def: Any) -> Iterator[Any]:
    yield graph_def.node
    for function in graph_def.library.function:
        yield function.node_def


def write_fingerprint(folder: str) -> None:
    """Write ``fingerprint.pb`` of a SavedModel again, after its variables."""
    fingerprinting_utils.write_fingerprint(folder)


def missing() -> str:
    """The first place that is gone; "" if all are there."""
    if not callable(getattr(training.Model, "_set_save_spec", None)):
        return "tf_keras Model._set_save_spec"
    if not callable(getattr(training.Model, "_should_use_autograph", None)):
        return "tf_keras Model._should_use_autograph"
    if not callable(getattr(fingerprinting_utils, "write_fingerprint", None)):
        return "fingerprinting_utils.write_fingerprint"
    traces = getattr(tf.function(lambda: None), "_function_cache", None)
    if not callable(getattr(traces, "values", None)):
        return "tf.function's _function_cache"
    return ""
