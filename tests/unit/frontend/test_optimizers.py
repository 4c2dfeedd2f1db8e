"""The slots of the Keras optimizers, counted after one update."""

from typing import Any

import pytest
import tensorflow as tf

from smp_tf.frontend.optimizers import slots_of

new, legacy = tf.keras.optimizers, tf.keras.optimizers.legacy
OPTIMIZERS = [
    *(getattr(new, name)() for name in (
        "Adadelta", "Adagrad", "Adam", "Adamax", "AdamW", "Ftrl", "Lion", "Nadam",
        "RMSprop", "SGD",
    )),
    *(getattr(legacy, name)() for name in (
        "Adadelta", "Adagrad", "Adam", "Adamax", "Ftrl", "Nadam", "RMSprop", "SGD",
    )),
    new.SGD(momentum=0.9), legacy.SGD(momentum=0.9),
    new.RMSprop(momentum=0.9), legacy.RMSprop(momentum=0.9),
    new.RMSprop(centered=True), legacy.RMSprop(centered=True),
    new.RMSprop(centered=True, momentum=0.9),
    new.Adam(amsgrad=True), legacy.Adam(amsgrad=True),
    new.Adam(use_ema=True), new.SGD(use_ema=True),
    tf.keras.mixed_precision.LossScaleOptimizer(new.Adam()),
    tf.keras.mixed_precision.LossScaleOptimizer(legacy.SGD(momentum=0.5)),
]  # fmt: skip


def describe(optimizer: Any) -> str:
    return f"{type(optimizer).__module__.split('.')[-1]}.{type(optimizer).__name__}"


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=describe)
def test_slots_are_those_that_an_update_makes(optimizer: Any) -> None:
    weight = tf.Variable(tf.ones([5, 7]))
    optimizer.apply_gradients([(tf.ones([5, 7]), weight)])
    variables = optimizer.variables
    made = [v for v in (variables() if callable(variables) else variables)]
    assert slots_of(optimizer) == sum(v.shape == weight.shape for v in made)


@pytest.mark.parametrize("name, slots", [("adam", 2), ("sgd", 1), ("adagrad", 1)])
def test_names(name: str, slots: int) -> None:
    assert slots_of(name) == slots


def test_an_unknown_optimizer_is_named() -> None:
    class Mine(new.Optimizer):
        pass

    with pytest.raises(ValueError, match="optimizer=Mine; known: .*give the number"):
        slots_of(Mine("mine"))
