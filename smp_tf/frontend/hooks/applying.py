"""A say in every ``apply_gradients`` of Keras, for loops of one's own."""

import functools
from collections.abc import Callable
from typing import Any

from tf_keras.src.mixed_precision import loss_scale_optimizer as scales
from tf_keras.src.optimizers import optimizer as new
from tf_keras.src.optimizers.legacy import optimizer_v2 as legacy

_PLAIN = "_smp_plain"

# Each of the four is where the pairs arrive, past what subclasses do with them.
_PLACES = {
    "tf_keras Optimizer": getattr(new, "Optimizer", None),
    "tf_keras OptimizerV2": getattr(legacy, "OptimizerV2", None),
    "tf_keras LossScaleOptimizerV3": getattr(scales, "LossScaleOptimizerV3", None),
    "tf_keras LossScaleOptimizer": getattr(scales, "LossScaleOptimizer", None),
}


def divert(
    is_taken: Callable[[Any, list[Any]], bool],
    apply: Callable[[Any, list[Any], Callable[[list[Any]], Any]], Any],
) -> None:
    """Let ``apply`` take the place of Keras's method where ``is_taken``. Once for a
    process; where it is not taken, the method does what it ever did.

    Args:
        is_taken: (optimizer, pairs of gradient and variable) -> whether.
        apply: (optimizer, the pairs, Keras's method as a function of pairs).
    """
    for place in _PLACES.values():
        plain = getattr(place, "apply_gradients", None)
        if plain is not None and not hasattr(plain, _PLAIN):
            setattr(place, "apply_gradients", _asking(plain, is_taken, apply))


def _asking(plain: Any, is_taken: Any, apply: Any) -> Any:
    # Not left out by AutoGraph: it converts what optimizers of one's own do in Python.
    def apply_gradients(
        self: Any, grads_and_vars: Any, *args: Any, **kwargs: Any
    ) -> Any:
        pairs = list(grads_and_vars)
        if is_taken(self, pairs):
            return apply(self, pairs, lambda pairs: plain(self, pairs, *args, **kwargs))
        return plain(self, pairs, *args, **kwargs)

    functools.update_wrapper(apply_gradients, plain)
    # AutoGraph would take the source of what is said to be wrapped.
    del apply_gradients.__wrapped__  # type: ignore[attr-defined]
    setattr(apply_gradients, _PLAIN, plain)
    return apply_gradients


def plain_method(method: Any) -> Any:
    """Keras's ``apply_gradients``, diverted or not."""
    return getattr(method, _PLAIN, method)


def missing() -> str:
    """The first place that is gone; "" if all are there."""
    for name, place in _PLACES.items():
        if not callable(getattr(place, "apply_gradients", None)):
            return f"{name}.apply_gradients"
    return ""
