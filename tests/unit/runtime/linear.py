"""A model whose results numpy can check, for the tests of ``smp.step``."""

from typing import Any

import numpy as np
import tensorflow as tf

import smp_tf as smp

M = 2  # microbatches of the tests that use it
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


class Linear(smp.DistributedModel):
    """x @ kernel, with kernel [3, 2]."""

    def __init__(self) -> None:
        super().__init__(name="linear")
        kernel = np.arange(6.0).reshape(3, 2)
        self.dense = tf.keras.layers.Dense(
            2, use_bias=False, kernel_initializer=tf.constant_initializer(kernel)
        )

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return self.dense(x)


KERNEL = np.arange(6, dtype="f").reshape(3, 2)


def rows(count: int, columns: int = 3) -> np.ndarray:
    return np.random.RandomState(0).randn(count, columns).astype("f")


def merged(output: Any) -> np.ndarray:
    return output.merge().numpy()
