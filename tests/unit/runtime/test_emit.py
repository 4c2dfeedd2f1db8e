"""Parts of the emitter that need no pipeline: how gradients are added together."""

import tensorflow as tf

from smp_tf.runtime import emit


def test_add_all_adds_by_position() -> None:
    tensors = [tf.constant(value) for value in (1.0, 2.0, 10.0, 20.0)]
    assert [total.numpy() for total in emit._add_all(*tensors)] == [11.0, 22.0]
