"""A train_step of the user's own, under ``fit``: the optimizer knows the whole model.

The truth is plain Keras, one process and whole batches.
"""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.keras.scripts import crossentropy, data
from tests.ranks import run_ranks

K = tf.keras
ROWS = 8


def net(base: Any, step: Any) -> Any:
    class Net(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="net")
            self.layers_of_net = [K.layers.Dense(12, "relu") for _ in range(3)]
            self.head = K.layers.Dense(3, dtype="float32")
            self.forward_backward = step(self._forward_backward)

        def call(self, x: Any) -> Any:
            for layer in self.layers_of_net:
                x = layer(x)
            return self.head(x)

        def _forward_backward(self, x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = self.compute_loss(x, y, self(x, training=True))
                scale = getattr(self.optimizer, "get_scaled_loss", None)
                scaled = loss if scale is None else scale(loss)
            return tape.gradient(scaled, self.trainable_variables), loss

        def train_step(self, data: Any) -> Any:
            x, y = data
            gradients, loss = self.forward_backward(x, y)
            if isinstance(loss, smp.StepOutput):
                gradients = [gradient.accumulate() for gradient in gradients]
                loss = loss.reduce_mean()
            if hasattr(self.optimizer, "get_unscaled_gradients"):
                gradients = self.optimizer.get_unscaled_gradients(gradients)
            pairs = zip(gradients, self.trainable_variables)
            self.optimizer.apply_gradients(pairs)
            return {"loss": loss}

    return Net()


def clipped(base: Any, step: Any) -> Any:
    K.utils.set_random_seed(1)
    model = net(base, step)
    model.compile(K.optimizers.SGD(0.5, global_clipnorm=0.01), crossentropy())
    x, y = data(32)
    history = model.fit(x, y, batch_size=ROWS, epochs=2, shuffle=False, verbose=0)
    return history.history["loss"], model.get_weights()


def scaled(base: Any, step: Any) -> Any:
    """The loss scale after examples so large that gradients overflow."""
    K.mixed_precision.set_global_policy("mixed_float16")
    K.utils.set_random_seed(1)
    model = net(base, step)
    optimizer = K.mixed_precision.LossScaleOptimizer(
        K.optimizers.SGD(0.001), initial_scale=2.0**14
    )
    model.compile(optimizer, crossentropy())
    x, y = data(64)
    model.fit(x * 300, y, batch_size=ROWS, shuffle=False, verbose=0)
    K.mixed_precision.set_global_policy("float32")
    return float(optimizer.loss_scale)


def on_a_rank() -> Any:
    smp.init({"microbatches": 2, "timeout_s": 30.0})
    return [run(smp.DistributedModel, smp.step) for run in (clipped, scaled)]


@pytest.mark.timeout(150)
def test_clipping_and_loss_scale_are_of_the_whole_model() -> None:
    losses, weights = clipped(K.Model, lambda function: function)
    ranks = run_ranks(2, on_a_rank, timeout=100)
    for (found, found_weights), _ in ranks:
        np.testing.assert_allclose(found, losses, rtol=2e-6)
        for mine, expected in zip(found_weights, weights, strict=True):
            np.testing.assert_allclose(mine, expected, rtol=2e-6, atol=2e-7)
    (_, first), (_, second) = ranks
    assert first == second < 2.0**14
