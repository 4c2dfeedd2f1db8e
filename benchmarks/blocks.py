"""The model of several benchmarks: transformer blocks, one after the other.

To be imported when the rank is pinned: TensorFlow counts cores.
"""

from __future__ import annotations

from typing import Any

import tensorflow as tf

from smp_tf.examples.char_gpt import Block


def stack(base: type, count: int, dim: int, heads: int) -> Any:
    """A model of hidden states [batch, length, dim].

    Args:
        base: smp.DistributedModel or keras.Model.
    """

    class Blocks(base):  # type: ignore[misc, valid-type]
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [Block(dim, heads) for _ in range(count)]

        def call(self, hidden: tf.Tensor) -> tf.Tensor:
            for block in self.blocks:
                hidden = block(hidden)
            return hidden

    return Blocks()
