"""Ways of calling a step, and its errors."""

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


def test_inside_functions_and_graph_loops() -> None:
    model, counter = Linear(), tf.Variable(0)
    traced = []

    @smp.step
    def step(x: Any) -> Any:
        traced.append(1)
        counter.assign_add(1)
        return tf.reduce_sum(model(x))

    @tf.function
    def outer(x: Any) -> Any:
        return step(x).reduce_sum() + step(x).reduce_sum()

    @tf.function
    def epoch(batches: Any) -> Any:
        total = 0.0
        for x in batches:
            total += step(x).reduce_sum()
        return total

    @tf.function
    def repeated(x: Any, times: Any) -> Any:
        total = 0.0
        for _ in tf.range(times):
            total += step(x).reduce_sum()
        return total

    x = rows(12)
    whole = (x @ KERNEL).sum()
    four = (x[:4] @ KERNEL).sum()
    np.testing.assert_allclose(step(x[:4]).reduce_sum(), four, rtol=1e-4)
    assert int(counter) == M
    np.testing.assert_allclose(outer(x[:4]), 2 * four, rtol=1e-4)
    assert int(counter) == 3 * M
    batches = tf.data.Dataset.from_tensor_slices(x).batch(4, drop_remainder=True)
    np.testing.assert_allclose(epoch(batches), whole, rtol=1e-4)
    assert int(counter) == 6 * M
    np.testing.assert_allclose(repeated(x[:4], 3), 3 * four, rtol=1e-4)
    assert int(counter) == 9 * M
    assert len(traced) == 1


def test_calls_in_one_function_keep_their_order() -> None:
    """All they do is read weights, which would leave the order to each rank."""
    model = Linear()
    steps = [smp.step(lambda x: model(x)), smp.step(lambda x: 2.0 * model(x))]

    @tf.function
    def function(x: tf.Tensor) -> Any:
        return [step(x).merge() for step in (*steps, steps[0])]

    graph = function.get_concrete_function(tf.ones([4, 3])).graph
    calls = [op for op in graph.get_operations() if "PartitionedCall" in op.type]
    assert [op.control_inputs for op in calls] == [[], calls[:1], calls[1:2]]


def test_training_in_an_outer_function_that_is_traced_twice() -> None:
    """The optimizer makes its slots in the first trace; the step keeps its own."""
    model, optimizer = Linear(), tf.keras.optimizers.Adam(0.1)

    @smp.step
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train(x: Any) -> Any:
        gradients, loss = step(x)
        means = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(means, model.trainable_variables))
        return loss.reduce_mean()

    x = rows(4)
    losses = [float(train(x)) for _ in range(20)]

    kernel, reference = tf.Variable(KERNEL), tf.keras.optimizers.Adam(0.1)
    for loss in losses:
        with tf.GradientTape() as tape:
            want = tf.reduce_mean((x @ kernel) ** 2)
        np.testing.assert_allclose(loss, want, rtol=1e-4)
        reference.apply_gradients([(tape.gradient(want, kernel), kernel)])
    np.testing.assert_allclose(model.dense.kernel, kernel, rtol=1e-4)


def test_enclosing_tapes_do_not_disturb_and_are_not_disturbed() -> None:
    model, scale = Linear(), tf.Variable(2.0)

    @smp.step
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x))
        return tape.gradient(loss, model.trainable_variables)

    x = rows(4)
    with tf.GradientTape() as outside:
        before = scale * 3.0
        (gradient,) = step(x)
        after = before + scale
    assert gradient is not None
    np.testing.assert_allclose(gradient.outputs[0][:, 0], x[:2].sum(0), **CLOSE)
    assert float(outside.gradient(after, scale)) == 4.0


def test_training_and_evaluation_share_a_model() -> None:
    class Dropped(Linear):
        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            y = super().call(x)
            return y if not training else y * 0.0

    model = Dropped()
    train = smp.step(lambda x: model(x, training=True))
    evaluate = smp.step(lambda x: model(x, training=False))
    x = rows(4)
    assert not merged(train(x)).any()
    np.testing.assert_allclose(merged(evaluate(x)), x @ KERNEL, **CLOSE)
    assert not merged(train(x)).any()


def test_a_step_outlives_its_session() -> None:
    model = Linear()
    step = smp.step(lambda x: model(x))
    x = rows(6)
    assert len(step(x).outputs) == M
    for count in (3, 1):
        with session(microbatches=count):
            result = step(x)
            assert len(result.outputs) == count
            np.testing.assert_allclose(merged(result), x @ KERNEL, **CLOSE)


def test_random_operations_differ_between_microbatches_and_calls() -> None:
    model = Linear()

    @smp.step
    def step(x: Any) -> Any:
        return model(x), tf.random.uniform([8], seed=3)

    draws = [draw.numpy() for _ in range(2) for draw in step(rows(4))[1].outputs]
    assert len({draw.tobytes() for draw in draws}) == 2 * M


# --- errors ---------------------------------------------------------------------------


def test_decorator_errors() -> None:
    def step(x: Any, y: Any) -> Any:
        """Never called."""

    with pytest.raises(smp.ConfigError, match=r"non_split_inputs.*\['z'\].*'x', 'y'"):
        smp.step(step, non_split_inputs=["z"])
    with pytest.raises(smp.ConfigError, match=r"input_split_axes.*\['z'\]"):
        smp.step(step, input_split_axes={"z": 1})
    with pytest.raises(smp.ConfigError, match=r"\['retrace'\].*step=step"):
        smp.step(step, retrace=True)
    with pytest.raises(NotImplementedError, match="jit_compile"):
        smp.step(step, jit_compile=True)
    smp.step(step, reduce_retracing=True, jit_compile=False)


def test_call_errors() -> None:
    model = Linear()
    step = smp.step(lambda x: model(x))
    with pytest.raises(smp.MicrobatchError, match=r"'x' shape=\(3, 3\).*batches=2"):
        step(rows(3))
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        step()
    with pytest.raises(TypeError, match="too many positional arguments"):
        step(rows(4), rows(4))
    smp.shutdown()
    with pytest.raises(smp.NotInitializedError, match="step"):
        step(rows(4))


def test_errors_keep_their_class_inside_a_function() -> None:
    model = Linear()
    step = smp.step(lambda x: model(x))
    with pytest.raises(smp.MicrobatchError):
        tf.function(lambda x: step(x).merge())(rows(3))


def test_errors_of_the_users_code_come_through_and_leave_nothing_behind() -> None:
    model, fail = Linear(), [True]

    @smp.step
    def step(x: Any) -> Any:
        if fail[0]:
            raise ValueError("of the user")
        return model(x)

    x = rows(4)
    with pytest.raises(ValueError, match="of the user"):
        step(x)
    fail[0] = False
    np.testing.assert_allclose(merged(step(x)), x @ KERNEL, **CLOSE)


def test_a_step_in_a_step_is_refused() -> None:
    model = Linear()
    inner = smp.step(lambda x: model(x))
    outer = smp.step(lambda x: inner(x).merge() + model(x))
    with pytest.raises(smp.TraceError, match="while another step is traced"):
        outer(rows(4))
