"""The whole list of variables, for an optimizer whose updates depend on each other.

In a ``tf.function`` the new Nadam multiplies its product of momentums once for each
variable that it updates, in the order of the list. So on every rank it gets the whole
list: what other ranks update is a scalar there, with a gradient of zero.
"""

import weakref
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from smp_tf.runtime import session

_scalars: weakref.WeakKeyDictionary[Any, dict[int, tf.Variable]] = (
    weakref.WeakKeyDictionary()
)
"""Optimizer -> place in the model -> what stands there for a foreign variable."""


def depends_on_order(optimizer: Any) -> bool:
    """Whether the update of a variable depends on the others."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    return isinstance(inner, tf.keras.optimizers.Nadam)


class InOrder:
    """The list of one update: made of the gradients of this rank's partition, before
    those that other replicas own are left out."""

    def __init__(
        self,
        optimizer: Any,
        gradients: Sequence[Any],
        variables: Sequence[tf.Variable],
        every: Sequence[tf.Variable],
    ) -> None:
        """Every rank of the pp_group must call it.

        Args:
            every: all trained variables of the model, in order; if it is empty, those
                of this rank are the list.
        """
        self._optimizer = optimizer
        self._every = every or variables
        if optimizer in _scalars:
            return
        has_gradient = {
            id(variable.handle)
            for gradient, variable in zip(gradients, variables, strict=True)
            if gradient is not None
        }
        self._trained = [
            place
            for place, variable in enumerate(self._every)
            if id(variable.handle) in has_gradient
        ]
        if every:
            found = session.allgather(self._trained, session.PP_GROUP)
            self._trained = sorted({place for each in found for place in each})

    def with_scalars(
        self, gradients: Sequence[Any], variables: Sequence[tf.Variable]
    ) -> tuple[list[Any], list[tf.Variable]]:
        """What this rank updates, and scalars for what other ranks do, in order."""
        mine = {
            id(variable.handle): (gradient, variable)
            for gradient, variable in zip(gradients, variables, strict=True)
        }
        if self._optimizer not in _scalars:
            with tf.init_scope():
                _scalars[self._optimizer] = {
                    place: self._scalar(place)
                    for place in self._trained
                    if id(self._every[place].handle) not in mine
                }
        scalars = _scalars[self._optimizer]
        pairs = []
        for place, variable in enumerate(self._every):
            if id(variable.handle) in mine:
                pairs.append(mine[id(variable.handle)])
            elif place in scalars:
                pairs.append((tf.zeros([], variable.dtype), scalars[place]))
        return [gradient for gradient, _ in pairs], [variable for _, variable in pairs]

    def _scalar(self, place: int) -> tf.Variable:
        return tf.Variable(0.0, dtype=self._every[place].dtype, trainable=False)
