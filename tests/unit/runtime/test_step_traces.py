"""When a step is traced, and what a trace keeps alive."""

import gc
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.unit.one_process import session
from tests.unit.runtime.linear import CLOSE, KERNEL, Linear, M, merged, rows


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with session(microbatches=M):
        yield


def test_traced_once_per_shape_and_python_value() -> None:
    model = Linear()
    traced = []

    @smp.step
    def step(x: Any, factor: float) -> Any:
        traced.append((x.shape.as_list(), factor))
        return model(x) * factor

    for _ in range(3):
        for count, factor in ((4, 1.0), (6, 1.0), (4, 2.0)):
            x = rows(count)
            np.testing.assert_allclose(
                merged(step(x, factor)), x @ KERNEL * factor, **CLOSE
            )
    assert traced == [([2, 3], 1.0), ([3, 3], 1.0), ([2, 3], 2.0)]


def test_input_signature_with_unknown_batch_is_one_trace() -> None:
    model = Linear()
    traced = []

    @smp.step(input_signature=[tf.TensorSpec([None, 3], tf.float32)])
    def step(x: Any) -> Any:
        traced.append(x.shape.as_list())
        return model(x)

    for count in (4, 6, 2):
        x = rows(count)
        np.testing.assert_allclose(merged(step(x)), x @ KERNEL, **CLOSE)
    assert traced == [[None, 3]]

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32)])
    def outer(x: Any) -> Any:
        return step(x).merge()

    np.testing.assert_allclose(outer(rows(8)), rows(8) @ KERNEL, **CLOSE)
    assert traced == [[None, 3]]
    with pytest.raises(tf.errors.InvalidArgumentError, match="microbatches=2"):
        outer(rows(3))
    with pytest.raises(TypeError, match="input_signature"):
        step(rows(4, 5))


def test_signature_of_a_method_and_of_defaults() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model, self.traced = Linear(), 0

        @smp.step(input_signature=[tf.TensorSpec([None, 3], tf.float32)])
        def step(self, x: Any, factor: float = 2.0) -> Any:
            self.traced += 1
            return self.model(x) * factor

    trainer = Trainer()
    for count in (2, 4):
        x = rows(count)
        np.testing.assert_allclose(merged(trainer.step(x)), x @ KERNEL * 2, **CLOSE)
    assert trainer.traced == 1


def test_autograph_may_be_left_out() -> None:
    model = Linear()

    @smp.step
    def converted(x: Any) -> Any:
        y = model(x)
        if tf.reduce_sum(x) > 0.0:
            y = -y
        return y

    x = np.concatenate([np.ones([2, 3]), -np.ones([2, 3])]).astype("f")
    want = np.concatenate([-x[:2] @ KERNEL, x[2:] @ KERNEL])
    np.testing.assert_allclose(merged(converted(x)), want, **CLOSE)

    @smp.step(autograph=False)
    def plain(x: Any) -> Any:
        if tf.reduce_sum(x) > 0.0:
            return model(x)
        return -model(x)

    with pytest.raises(TypeError, match="bool"):
        plain(x)


class Recurrent(smp.DistributedModel):
    def __init__(self) -> None:
        super().__init__(name="recurrent")
        self.lstm = tf.keras.layers.LSTM(4)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.lstm(x)


def test_functions_inside_a_step_live_as_long_as_it_does() -> None:
    """An LSTM's backward is a function of its own, which TensorFlow forgets with the
    last graph that it knows to call it."""
    model = Recurrent()

    @smp.step
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    for shape in ((4, 3, 5), (8, 3, 5), (4, 7, 5)):
        x = tf.ones(shape)
        step.plan(x)
        gc.collect()
        gradients, loss = step(x)
        whole = tf.reduce_sum(model.lstm(x) ** 2)
        np.testing.assert_allclose(M * loss.reduce_mean(), whole, **CLOSE)
        assert all(np.any(gradient.accumulate()) for gradient in gradients)
