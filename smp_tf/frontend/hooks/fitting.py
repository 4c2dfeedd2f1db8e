"""What ``Model.fit`` keeps for itself, and a model that fits in its own way needs."""

from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context
from tf_keras.src.engine import training

_COUNTERS = {
    "train": "_train_counter",
    "test": "_test_counter",
    "predict": "_predict_counter",
}


def counter_of(model: Any, phase: str) -> tf.Variable:
    """The variable that counts a model's batches: TensorBoard's steps."""
    counter: tf.Variable = getattr(model, _COUNTERS[phase])
    return counter


def require_target_and_loss(model: Any, y: Any, loss: Any) -> None:
    """Raise Keras's ValueError for missing targets, or for no loss at all."""
    model._validate_target_and_loss(y, loss)


def require_compiled(model: Any) -> None:
    """Raise Keras's RuntimeError if ``compile`` was not called."""
    model._assert_compile_was_called()


def global_seed() -> int | None:
    """What ``tf.random.set_seed`` was called with; None if it was not."""
    seed: int | None = context.global_seed()
    return seed


def missing() -> str:
    """The first place that is gone; "" if all are there."""
    places = ("_validate_target_and_loss", "_assert_compile_was_called")
    for name in places:
        if not callable(getattr(training.Model, name, None)):
            return f"tf_keras Model.{name}"
    if not hasattr(training.Model, "_init_batch_counters"):
        return "tf_keras Model._init_batch_counters"
    return ""
