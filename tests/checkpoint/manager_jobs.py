"""A small training, as a user writes it, for tests of ``smp.CheckpointManager``."""

import os
from typing import Any

import numpy as np
import tensorflow as tf

import smp_tf as smp

K = tf.keras
ROWS, WIDTH = 8, 6


def net(base: Any, layers: int = 4, width: int = 12, dropout: float = 0.0) -> Any:
    """The same model of any class: ``smp.DistributedModel`` or ``tf.keras.Model``."""

    class Net(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="net")
            self.hidden = [K.layers.Dense(width, "tanh") for _ in range(layers)]
            self.norm = K.layers.BatchNormalization()
            self.drop = K.layers.Dropout(dropout)
            self.last = K.layers.Dense(1)

        def call(self, x: Any, training: bool | None = None) -> Any:
            for layer in self.hidden:
                x = layer(x)
            x = self.norm(x, training=training)
            return self.last(self.drop(x, training=training))

    return Net()


def start(partitions: int | None = None, **config: Any) -> None:
    """smp.init; by default with as many partitions as ranks."""
    size = int(os.environ.get("HOROVOD_SIZE", 1))
    config = {"microbatches": 2, "timeout_s": 40.0, **config}
    smp.init({"partitions": partitions or size, **config})
    K.utils.set_random_seed(5)


def optimizer_of(kind: str) -> Any:
    """One with a schedule and several slots."""
    schedule = K.optimizers.schedules.CosineDecay(0.05, 12)
    if kind == "legacy":
        return K.optimizers.legacy.Adam(schedule, amsgrad=True)
    return K.optimizers.Adam(schedule, use_ema=True)


def batches() -> Any:
    """Endless, shuffled, the same in each run."""
    chance = np.random.RandomState(3)
    x = chance.standard_normal((64, WIDTH)).astype(np.float32)
    y = (x[:, :1] * x[:, 1:2]).astype(np.float32)
    data = tf.data.Dataset.from_tensor_slices((x, y)).shuffle(64, seed=5)
    return data.repeat().batch(ROWS, drop_remainder=True)


def trainer(model: Any, optimizer: Any) -> Any:
    """A function that trains with one batch and returns the loss."""

    @smp.step
    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x, training=True) - y) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train(x: Any, y: Any) -> Any:
        gradients, loss = step(x, y)
        means = [each.accumulate() for each in gradients]
        optimizer.apply_gradients(zip(means, model.trainable_variables))
        return loss.reduce_mean()

    return train


def plain_trainer(model: Any, optimizer: Any) -> Any:
    """The same without smp_tf, in two microbatches."""

    @tf.function
    def train(x: Any, y: Any) -> Any:
        sums, losses = None, []
        for xs, ys in zip(tf.split(x, 2), tf.split(y, 2)):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(xs, training=True) - ys) ** 2)
            found = tape.gradient(loss, model.trainable_variables)
            sums = found if sums is None else [a + b for a, b in zip(sums, found)]
            losses.append(loss)
        pairs = zip([each / 2 for each in sums], model.trainable_variables)
        optimizer.apply_gradients(pairs)
        return tf.reduce_mean(losses)

    return train


def values_of(checkpoint: Any) -> dict[str, Any]:
    """Name -> value of what this rank has."""
    from smp_tf.checkpoint import names, parts

    here = parts.here(names.names_of(checkpoint))
    return {name: variable.numpy() for name, variable in here.items()}


def merged(found: list[dict[str, Any]]) -> dict[str, Any]:
    """The values of all ranks; those that several have must be the same."""
    every: dict[str, Any] = {}
    for values in found:
        for name, value in values.items():
            np.testing.assert_array_equal(every.setdefault(name, value), value, name)
    return every


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(found[name], value, name)
