"""How much state a Keras optimizer keeps for each weight."""

from typing import Any

import tensorflow as tf

# Copies of a weight's size; options that add one are looked up in the optimizer.
_SLOTS = {
    "adadelta": 2,
    "adagrad": 1,
    "adam": 2,
    "adamax": 2,
    "adamw": 2,
    "ftrl": 2,
    "lion": 1,
    "nadam": 2,
    "rmsprop": 1,
    "sgd": 0,  # the new one: always 1
}
_ADDING = ("momentum", "centered", "amsgrad", "use_ema")


def slots_of(optimizer: Any) -> int:
    """Bytes of state per byte of a trained weight.

    Args:
        optimizer: a Keras optimizer, new, legacy or wrapped by a LossScaleOptimizer, or
            its name.

    Raises:
        ValueError: it is not known how much state it keeps.
    """
    if isinstance(optimizer, str):
        optimizer = tf.keras.optimizers.get(optimizer)
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    name = type(inner).__name__.lower()
    if name not in _SLOTS:
        raise ValueError(
            "the state of this optimizer is not known:"
            f" optimizer={type(inner).__name__}; known: {sorted(_SLOTS)}; give the"
            " number of its slots instead"
        )
    return _SLOTS[name] + sum(_has(inner, option) for option in _ADDING)


def _has(optimizer: Any, option: str) -> bool:
    if option == "momentum":
        if isinstance(optimizer, tf.keras.optimizers.SGD):
            return True  # it makes the slot whether it uses it or not
        # In legacy ones the value itself is a hyperparameter.
        return bool(getattr(optimizer, "_momentum", getattr(optimizer, option, False)))
    return bool(getattr(optimizer, option, False))
