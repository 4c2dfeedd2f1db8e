"""A model with every way in which a variable gets its first value."""

from typing import Any

import numpy as np
import tensorflow as tf

K = tf.keras


def drawn(shape: Any, dtype: Any = None, **unused: Any) -> tf.Tensor:
    """With the global seed only: another seed in each call."""
    return tf.random.normal(shape, dtype=dtype)


def op_seeded(shape: Any, dtype: Any = None, **unused: Any) -> tf.Tensor:
    """With its own seed: eagerly, each call goes on where the last one ended."""
    return tf.random.uniform(shape, dtype=dtype, seed=3)


def from_numpy(shape: Any, dtype: Any = None, **unused: Any) -> np.ndarray:
    return np.random.rand(*shape)


class NeedsValues(K.initializers.Initializer):
    """Cannot be traced, and draws a Keras seed before that shows."""

    def __init__(self) -> None:
        self.normal = K.initializers.RandomNormal()

    def __call__(self, shape: Any, dtype: Any = None, **unused: Any) -> tf.Tensor:
        return tf.constant(self.normal(shape, dtype).numpy() + 1.0)


class ManyWays(K.layers.Layer):
    def build(self, shape: tf.TensorShape) -> None:
        initializers = {
            "drawn": drawn,
            "op_seeded": op_seeded,
            "op_seeded_again": op_seeded,
            "numpy": from_numpy,
            "needs_values": NeedsValues(),
            "drawn_again": drawn,
            "orthogonal": "orthogonal",
            "truncated": "truncated_normal",
            "identity": "identity",
            "seeded": K.initializers.HeNormal(seed=4),
            "scaled": K.initializers.VarianceScaling(2.0),
            "of_tensorflow": tf.random_normal_initializer(),
        }
        self.ways = [
            self.add_weight(name, [shape[-1], shape[-1]], initializer=initializer)
            for name, initializer in initializers.items()
        ]
        self.dependent = tf.Variable(lambda: self.ways[0] * 2.0, name="dependent")
        self.constant = tf.Variable(tf.random.normal([int(shape[-1])]), name="constant")
        self.counter = self.add_weight(
            "counter", [], dtype=tf.int64, initializer="ones", trainable=False
        )

    def call(self, x: tf.Tensor) -> tf.Tensor:
        for way in self.ways:
            x = x + x @ way
        return x @ self.dependent + self.constant + tf.cast(self.counter, x.dtype)


def every_initializer(base: type) -> Any:
    """For inputs of 4 features; built with plain Keras or as a DistributedModel."""

    class Everything(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="everything")
            self.ways = ManyWays()
            self.dense = K.layers.Dense(36, "relu")
            self.shape = K.layers.Reshape([6, 6, 1])
            self.conv = K.layers.Conv2D(3, 3)
            self.norm = K.layers.BatchNormalization()
            self.flat = K.layers.Reshape([16, 3])
            self.lstm = K.layers.LSTM(5)
            self.layer_norm = K.layers.LayerNormalization()
            x = y = K.Input([5])
            for width in (6, 4):
                y = K.layers.Dense(width, "tanh")(y)
            self.functional = K.Model(x, y)
            self.sequential = K.Sequential([K.layers.Dense(3, input_shape=[4])])
            self.embedding = K.layers.Embedding(7, 3)
            self.own = self.add_weight("own", [3, 3], initializer="glorot_uniform")

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            ids = tf.cast(x[:, 0] > 0.0, tf.int32)
            x = self.conv(self.shape(self.dense(self.ways(x))))
            x = self.layer_norm(self.lstm(self.flat(self.norm(x, training=training))))
            x = self.sequential(self.functional(x)) + self.embedding(ids)
            return x @ self.own

    return Everything()
