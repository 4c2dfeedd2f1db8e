"""Ways of the optimizers, new, legacy and of TensorFlow 1, on all kinds of gradients.

The model begins with an embedding, so that one gradient is a ``tf.IndexedSlices``.
"""

import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tests.models.script import Job, JobCase, cross_entropy, layers
from tests.models.trainer import sentences

new = tf.keras.optimizers
legacy = tf.keras.optimizers.legacy
v1 = tf.compat.v1.train
LossScale = tf.keras.mixed_precision.LossScaleOptimizer

_Ways = Callable[[Any, tf.Tensor, Any, Any], Any]


def _speaker(base: type) -> Any:
    class Speaker(base):
        def __init__(self) -> None:
            super().__init__(name="speaker")
            self.embed = layers.Embedding(20, 8)
            self.parts = [layers.Dense(8, activation="tanh") for _ in range(3)]
            self.norm = layers.LayerNormalization()
            self.head = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = tf.reduce_mean(self.embed(x), 1)
            for part in self.parts:
                x = x + part(x)
            return self.head(self.norm(x))

    return Speaker()


def by_tape(optimizer: Any, loss: tf.Tensor, weights: Any, tape: Any) -> Any:
    return tape.gradient(loss, weights)


def get_gradients(optimizer: Any, loss: tf.Tensor, weights: Any, tape: Any) -> Any:
    return optimizer.get_gradients(loss, weights)


def compute_gradients(optimizer: Any, loss: tf.Tensor, weights: Any, tape: Any) -> Any:
    """The first half of a new optimizer's ``minimize``."""
    return [
        gradient for gradient, _ in optimizer.compute_gradients(loss, weights, tape)
    ]


def v1_compute_gradients(
    optimizer: Any, loss: tf.Tensor, weights: Any, tape: Any
) -> Any:
    """The first half of the ``minimize`` of TensorFlow 1."""
    found = optimizer.compute_gradients(loss, var_list=weights)
    return [gradient for gradient, _ in found]


def v1_gradients(optimizer: Any, loss: tf.Tensor, weights: Any, tape: Any) -> Any:
    return tf.compat.v1.gradients(loss, weights)


def scaled(optimizer: Any, loss: tf.Tensor, weights: Any, tape: Any) -> Any:
    """A loss scale, for the way back through types of small range."""
    with tape:
        loss = optimizer.get_scaled_loss(loss)
    return optimizer.get_unscaled_gradients(tape.gradient(loss, weights))


def _build(
    make: Callable[[], Any],
    differentiate: _Ways,
    in_function: bool,
    base: type,
    step: Callable[..., Any],
) -> Job:
    model, optimizer = _speaker(base), make()

    @step
    def forward_backward(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = cross_entropy(y, model(x, training=True))
        return differentiate(optimizer, loss, model.trainable_variables, tape), loss

    def update(x: Any, y: Any) -> tf.Tensor:
        gradients, loss = forward_backward(x, y)
        pairs = zip(gradients, model.trainable_variables, strict=True)
        optimizer.apply_gradients([(g.accumulate(), v) for g, v in pairs])
        return loss.reduce_mean()

    data = sentences(*[(8, 5)] * 4)
    apply = tf.function(update) if in_function else update

    def main() -> Any:
        return [apply(x, y) for x, y in data]

    return Job(main, [model], lambda: forward_backward.plan(*data[0]))


def _falling() -> Any:
    return new.schedules.PiecewiseConstantDecay([1, 2], [0.1, 0.05, 0.02])


_CASES = [
    ("sgd", lambda: new.SGD(_falling(), momentum=0.9, nesterov=True), by_tape),
    ("adam", lambda: new.Adam(0.01), compute_gradients),
    ("adamw", lambda: new.AdamW(0.01, clipnorm=0.1, use_ema=True), by_tape),
    ("legacy_sgd", lambda: legacy.SGD(_falling(), momentum=0.9), get_gradients),
    ("legacy_adam", lambda: legacy.Adam(0.01, clipvalue=0.02), get_gradients),
    ("legacy_adam_tape", lambda: legacy.Adam(0.01, amsgrad=True), by_tape),
    (
        "loss_scale",
        lambda: LossScale(new.Adam(0.01), dynamic=False, initial_scale=128.0),
        scaled,
    ),
]
_EAGER_CASES = [
    ("v1_momentum", lambda: v1.MomentumOptimizer(0.1, 0.9), v1_compute_gradients),
    ("v1_adagrad", lambda: v1.AdagradOptimizer(0.1), v1_gradients),
]

CASES = [
    JobCase(
        name,
        differentiate.__name__,
        functools.partial(_build, make, differentiate, in_function),
    )
    for cases, in_function in ((_CASES, True), (_EAGER_CASES, False))
    for name, make, differentiate in cases
]
