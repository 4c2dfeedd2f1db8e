"""What a user's optimizer does to gradients by itself.

An optimizer of a pipeline has the gradients of its partition; and ``fit`` gives them to
``apply_gradients``, where Keras's own train_step calls ``minimize``.
"""

import logging
import weakref
from typing import Any

from smp_tf.errors import ConfigError
from smp_tf.runtime import session

_NOT_CALLED = ("minimize", "compute_gradients", "_compute_gradients", "get_gradients")

_KNOWN = ("tf_keras", "keras", "transformers", "horovod", "smp_tf")
"""Packages whose optimizers look at one gradient at a time in these methods."""

_told: weakref.WeakSet[Any] = weakref.WeakSet()

logger = logging.getLogger("smp_tf")


def require_single_gradients(optimizer: Any) -> None:
    """Refuse what would see a part of the gradients only, and warn of what may.

    Raises:
        ConfigError: the optimizer has ``gradient_transformers``, and there are several
            partitions.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    given = getattr(inner, "gradient_transformers", None)
    if given and session.pp_size() > 1:
        names = [getattr(each, "__name__", repr(each)) for each in given]
        raise ConfigError(
            "gradient_transformers would see the gradients of one partition only:"
            f" optimizer={type(inner).__name__} gradient_transformers={names}"
            f" partitions={session.pp_size()}; clip with clipvalue, clipnorm or"
            " global_clipnorm, or change the gradients in a train_step of your own"
        )
    if inner in _told or session.rank() != 0:
        return
    _told.add(inner)
    skipped = [name for name in _NOT_CALLED if _is_own(inner, name)]
    if skipped:
        logger.warning(
            "fit calls the optimizer's apply_gradients, and none of the methods that"
            " make gradients: optimizer=%s overrides %s; move what they do to"
            " apply_gradients, or write a train_step of your own",
            type(inner).__name__,
            ", ".join(skipped),
        )
    if session.pp_size() > 1 and _is_own(inner, "apply_gradients"):
        logger.warning(
            "an optimizer of a pipeline is given the gradients of its own partition:"
            " optimizer=%s overrides apply_gradients; this is right only where it looks"
            " at one gradient at a time",
            type(inner).__name__,
        )


def _is_own(optimizer: Any, name: str) -> bool:
    """Whether a class of the user's defines the method."""
    for cls in type(optimizer).__mro__:
        if name in vars(cls):
            defined = getattr(vars(cls)[name], "__module__", cls.__module__)
            package = str(defined).partition(".")[0]
            if package != "smp_tf":
                return package not in _KNOWN
    return False
