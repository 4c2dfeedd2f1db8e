"""Tensors of strings between ranks: their bytes, and as part of a step."""

from typing import Any

import numpy as np
import tensorflow as tf

import smp_tf as smp
from smp_tf.transport import ops
from tests.ranks import run_ranks

LONG = "x" * 3_000_000
CASES = {
    "scalar": tf.constant("one"),
    "matrix": tf.constant([["", "a"], ["é" * 20, "\0 in it"]]),
    "long": tf.constant([LONG, "", LONG[:-1]]),
    "none": tf.constant([], tf.string, shape=[0, 3]),
    "many": tf.strings.as_string(tf.range(10_000)),
}
SHAPES = {"matrix": tf.TensorShape([None, 2]), "many": tf.TensorShape(None)}


def send_and_receive() -> dict[str, bool]:
    smp.init({"partitions": 2})
    peer = 1 - smp.rank()
    found = {}
    for number, (name, value) in enumerate(CASES.items(), 100):
        shape = SHAPES.get(name, value.shape)
        given = {"peer": peer, "channel": number, "shape": shape, "label": name}
        if shape.rank is None:
            given["shape"] = tf.TensorShape([None])
        ops.recv_post(tf.string, **given)
        ops.send_post(value, **given)
        arrived = ops.recv_wait(tf.string, **given)
        ops.send_flush()
        same = np.array_equal(arrived.numpy(), value.numpy())
        found[name] = same and arrived.shape == value.shape
    return found


def test_every_string_arrives() -> None:
    for found in run_ranks(2, send_and_receive, timeout=100):
        assert found == dict.fromkeys(CASES, True)


class Worded(smp.DistributedModel):
    """The second half reads numbers that the first half has written as text."""

    def __init__(self) -> None:
        super().__init__()
        self.first = tf.keras.layers.Dense(4, name="first")
        self.second = tf.keras.layers.Dense(1, name="second")

    def call(self, x: Any) -> Any:
        with smp.partition(0):
            text = tf.strings.as_string(tf.round(self.first(x)))
        with smp.partition(1):
            return self.second(tf.strings.to_number(text)), text


def step_with_strings() -> tuple[list[list[bytes]], np.ndarray, list[str]]:
    smp.init(
        {
            "partitions": 2,
            "microbatches": 2,
            "auto_partition": False,
            "default_partition": 0,
        }
    )
    tf.keras.utils.set_random_seed(1)
    model = Worded()

    @smp.step
    def step(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        return model(x)

    @tf.function
    def outer(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        value, text = step(x)
        return value.concat(), text.concat()

    x = 3 * tf.reshape(tf.range(12.0), [4, 3])
    value, text = outer(x)
    plan = step.plan(x)
    crossing = [cut.tensor for cut in plan.segments.cuts if cut.spec.dtype == "string"]
    return text.numpy().tolist(), value.numpy(), crossing


def test_a_step_sends_strings_from_layer_to_layer() -> None:
    (texts, values, crossing), other = run_ranks(2, step_with_strings, timeout=100)
    assert texts == other[0] and crossing
    np.testing.assert_array_equal(values, other[1])
    tf.keras.utils.set_random_seed(1)
    first, second = tf.keras.layers.Dense(4), tf.keras.layers.Dense(1)
    rounded = tf.round(first(3 * tf.reshape(tf.range(12.0), [4, 3])))
    assert texts == tf.strings.as_string(rounded).numpy().tolist()
    np.testing.assert_allclose(values, second(rounded), rtol=1e-5)
