"""Keras's clipping by the norm of all gradients, where each rank has some of them."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.runtime.clipping import norm_of

_CLIPS = ("clipvalue", "clipnorm", "global_clipnorm")


def options_of(optimizer: Any) -> dict[str, Any]:
    """The optimizer's clipping options that are set."""
    found = {name: getattr(optimizer, name, None) for name in _CLIPS}
    return {name: value for name, value in found.items() if value is not None}


class Clip:
    """What ``global_clipnorm`` asks for, done before the optimizer sees the gradients.

    New optimizers clip in one way: by the first that is set of clipnorm,
    global_clipnorm and clipvalue. Legacy ones clip in every way that is set: by value,
    by norm, by global norm.

    Attributes:
        is_needed: whether the optimizer clips by the norm of all gradients.
    """

    def __init__(self, optimizer: Any) -> None:
        """
        Args:
            optimizer: the one that clips: within a LossScaleOptimizer.
        """
        self._optimizer = optimizer
        self._options = options_of(optimizer)
        self._is_legacy = isinstance(optimizer, tf.keras.optimizers.legacy.Optimizer)
        limit = self._options.get("global_clipnorm")
        if self._is_legacy:
            self.is_needed = limit is not None
        else:
            self.is_needed = _is_on(limit) and not _is_on(self._options.get("clipnorm"))

    def each(self, gradients: Sequence[Any]) -> list[Any]:
        """What a legacy optimizer does to single gradients before it takes the norm."""
        value = self._options.get("clipvalue") if self._is_legacy else None
        norm = self._options.get("clipnorm") if self._is_legacy else None

        def clipped(gradient: Any) -> Any:
            if gradient is not None and value is not None:
                gradient = tf.clip_by_value(gradient, -value, value)
            if gradient is not None and norm is not None:
                gradient = tf.clip_by_norm(gradient, norm)
            return gradient

        return [clipped(gradient) for gradient in gradients]

    def all(self, gradients: Sequence[Any], half: tf.Tensor) -> list[Any]:
        """Clip by the norm, from half the sum of squares over all ranks."""
        limit, norm = self._options["global_clipnorm"], norm_of(half, gradients)
        clipped, _ = tf.clip_by_global_norm(gradients, limit, norm)
        return list(clipped)

    @contextlib.contextmanager
    def done(self) -> Iterator[None]:
        """Keep the optimizer from clipping again what is clipped already: by the norm
        of this rank's part, and, in a new one, by value in place of by norm."""
        kept = self._options if self.is_needed else {}
        try:
            for name in kept:
                setattr(self._optimizer, name, None)
            yield
        finally:
            for name, value in kept.items():
                setattr(self._optimizer, name, value)


def _is_on(limit: float | None) -> bool:
    return limit is not None and limit > 0
