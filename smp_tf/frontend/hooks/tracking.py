"""What checkpoints follow: objects tracked by name, and how a variable is restored."""

import contextlib
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.python.checkpoint import tensor_callable
from tensorflow.python.trackable import base as trackable
from tensorflow.python.training.saving import saveable_object

VALUE = trackable.VARIABLE_VALUE_KEY


def saved_as(read: Callable[[], Any], dtype: Any, device: str) -> dict[str, Any]:
    """What a variable's ``_serialize_to_tensors`` returns: ``read`` gives the value
    when a checkpoint is written."""
    return {VALUE: tensor_callable.Callable(read, dtype=dtype, device=device)}


class VariableSaveable(saveable_object.SaveableObject):
    """Saves and restores a variable by its own methods.

    For variables inside those of mixed precision, which hand on the older interface:
    TensorFlow's own object for it sets the resource and asks no method.
    """

    def __init__(self, variable: Any, name: str) -> None:
        spec = variable._serialize_to_tensors()[VALUE]
        spec.name, spec.slice_spec = name, ""
        super().__init__(variable, [spec], name)
        self._variable = variable

    def restore(self, restored_tensors: Sequence[Any], restored_shapes: Any) -> Any:
        return self._variable._restore_from_tensors({VALUE: restored_tensors[0]})


@contextlib.contextmanager
def without_attributes(
    model: Any, names: Collection[str], is_reading: bool, is_known: bool = False
) -> Iterator[None]:
    """Inside, attributes of a Keras model are None and no part of files.

    Args:
        names: attributes; those that the model has not, or not yet, count too.
        is_reading: what a checkpoint that is read inside has under these names is not
            kept for an object that gets the name later.
        is_known: they keep their values, so that a file can say what they are.
    """
    held = {name: vars(model)[name] for name in names if name in vars(model)}
    tracked = {name: model._lookup_dependency(name) for name in names}
    for name in names:
        if not is_known:
            vars(model)[name] = None
        model._delete_tracking(name)
        if is_reading:
            sink = tf.__internal__.tracking.AutoTrackable()
            model._track_trackable(sink, name, overwrite=True)
    try:
        yield
    finally:
        for name in names:
            model._delete_tracking(name)
            if tracked[name] is not None:
                model._track_trackable(tracked[name], name, overwrite=True)
            vars(model).pop(name, None)
        vars(model).update(held)


def generator_of(layer: Any) -> Any:
    """The tf.random.Generator of a Keras layer that draws numbers from one, which Keras
    keeps out of checkpoints; None if it has none, or not yet."""
    attributes = getattr(layer, "__dict__", {})  # a tuple, as tracked, has none
    found = getattr(attributes.get("_random_generator"), "_generator", None)
    return found if isinstance(found, tf.random.Generator) else None


def has_own_state(each: Any) -> bool:
    """Whether a checkpoint of TensorFlow would have something of this object besides
    variables: a hash table that is not empty, a PythonState and their like."""
    if not isinstance(each, trackable.Trackable):
        return False
    own, common = type(each), trackable.Trackable
    is_saved = any(
        getattr(own, name) is not getattr(common, name)
        for name in ("_serialize_to_tensors", "_gather_saveables_for_checkpoint")
    )
    # Keras counts in a table what a StringLookup sees while it adapts, and empties it.
    is_table = isinstance(each, tf.lookup.experimental.MutableHashTable)
    return is_saved and not (is_table and int(each.size()) == 0)


def missing() -> str:
    """The first place that is gone; "" if all are there."""
    for name in ("_lookup_dependency", "_delete_tracking", "_track_trackable"):
        if not callable(getattr(tf.keras.Model, name, None)):
            return f"Trackable.{name}"
    for name in ("_serialize_to_tensors", "_gather_saveables_for_checkpoint"):
        if not callable(getattr(trackable.Trackable, name, None)):
            return f"Trackable.{name}"
    if "_serialize_to_tensors" not in vars(tf.lookup.experimental.MutableHashTable):
        return "MutableHashTable._serialize_to_tensors"
    for name in ("_serialize_to_tensors", "_restore_from_tensors"):
        if not callable(getattr(tf.Variable, name, None)):
            return f"tf.Variable.{name}"
    return ""
