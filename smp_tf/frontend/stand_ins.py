"""Variables whose values are somewhere else while a block of code runs.

Code that reads and sets variables, as Keras does when it writes and reads files, works
on them as on any others. What it reads comes from ``Values.read`` and what it sets goes
to ``Values.write``, in the memory of the host; the variables' own memory, which may be
on a device too small for all of them, is left as it is.

A graph that is traced meanwhile, as those of a SavedModel are, has the variables
themselves: it will run where they have values.
"""

import contextlib
import contextvars
import uuid
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import tensorflow as tf

from smp_tf.errors import SmpError
from smp_tf.frontend.hooks import initial_values, tracking
from smp_tf.frontend.variables import DeferredVariable

_labels = contextvars.ContextVar[dict[str, Any] | None]("_labels", default=None)

_ordinary = initial_values.ResourceVariable

_HOST = "/job:localhost/replica:0/task:0/device:CPU:0"


class Values(Protocol):
    """The place where the values are; variables are known by their index."""

    def read(self, index: int) -> Any:
        """The value as ``tf.Variable.numpy`` gives it; the caller may change it."""

    def write(self, index: int, value: Any) -> None:
        """Take the new value, of the variable's shape and dtype, in NumPy's form."""


class StandIn(DeferredVariable):
    """The class of a variable inside ``standing_in``."""

    _smp_values: Values
    _smp_index: int

    @property
    def device(self) -> str:
        return _HOST

    def numpy(self) -> Any:
        return self._smp_values.read(self._smp_index)

    def __repr__(self) -> str:
        return f"<tf.Variable {self.name!r} shape={self.shape} dtype={self.dtype.name}>"

    def _smp_get_ready(self) -> None:
        if tf.executing_eagerly():
            raise SmpError(
                "a variable can only be read or set as a whole while a model is saved"
                f" or loaded: variable={self.name!r}"
            )

    def _read_variable_op(self, no_copy: bool = False) -> tf.Tensor:
        if not tf.executing_eagerly():
            return _ordinary._read_variable_op(self, no_copy)
        return _on_host(self.numpy(), self.dtype)

    def read_value_no_copy(self) -> tf.Tensor:
        return self._read_variable_op(no_copy=True)

    def read_value(self) -> tf.Tensor:
        return self._read_variable_op()

    def is_initialized(self, name: str | None = None) -> tf.Tensor:
        return tf.constant(True)

    def assign(
        self,
        value: Any,
        use_locking: bool | None = None,
        name: str | None = None,
        read_value: bool = True,
    ) -> Any:
        if not tf.executing_eagerly():
            return _ordinary.assign(self, value, use_locking, name, read_value)
        tensor = _on_host(value, self.dtype)
        if not self.shape.is_compatible_with(tensor.shape):
            raise ValueError(
                "the shape of a value must be that of the variable:"
                f" variable={self.name!r} shape={self.shape} value's"
                f" shape={tensor.shape}"
            )
        self._smp_values.write(self._smp_index, tensor.numpy())
        return self

    def assign_add(self, delta: Any, *args: Any, **kwargs: Any) -> Any:
        if not tf.executing_eagerly():
            return _ordinary.assign_add(self, delta, *args, **kwargs)
        return self.assign(self._read_variable_op() + delta)

    def assign_sub(self, delta: Any, *args: Any, **kwargs: Any) -> Any:
        if not tf.executing_eagerly():
            return _ordinary.assign_sub(self, delta, *args, **kwargs)
        return self.assign(self._read_variable_op() - delta)

    def _serialize_to_tensors(self) -> dict[str, Any]:
        # TensorFlow may save in a graph of its own, which has no values to read.
        return tracking.saved_as(self._smp_saved, self.dtype, self.device)

    def _smp_saved(self) -> tf.Tensor:
        """What a checkpoint gets."""
        labels = _labels.get()
        if labels is None:
            return _on_host(self.numpy(), self.dtype)
        label = f"{uuid.uuid4().hex} {self._smp_index}"
        labels[label] = self
        return _on_host(label, tf.string)

    def _restore_from_tensors(self, restored_tensors: Any) -> Any:
        (value,) = restored_tensors.values()
        self.assign(value)
        return tf.constant(0)  # where others return the operation that assigns


def _on_host(value: Any, dtype: tf.DType) -> tf.Tensor:
    with tf.init_scope(), tf.device(_HOST):
        return tf.convert_to_tensor(value, dtype=dtype)


@contextlib.contextmanager
def standing_in(variables: Sequence[Any], values: Values) -> Iterator[None]:
    """Take and give the values of ``variables`` by ``values`` inside."""
    found = [initial_values.variable_of(each.handle) for each in variables]
    classes = [type(variable) for variable in found]
    try:
        for index, variable in enumerate(found):
            variable._smp_values, variable._smp_index = values, index
            variable.__class__ = StandIn
        yield
    finally:
        for variable, ordinary in zip(found, classes, strict=True):
            variable.__class__ = ordinary
            vars(variable).pop("_smp_values", None)
            vars(variable).pop("_smp_index", None)


@contextlib.contextmanager
def labelled() -> Iterator[dict[str, Any]]:
    """Checkpoints that are saved inside get a label in the place of each value.

    Yields:
        Label -> variable, of those saved so far: so that the values can be read one by
        one afterwards, in ``standing_in`` still, by ``numpy()``.
    """
    labels: dict[str, Any] = {}
    token = _labels.set(labels)
    try:
        yield labels
    finally:
        _labels.reset(token)
