"""Counters of random operations: their names, and what is restored."""

import json
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.runtime.random_counters import RandomCounters, counters_of
from tests.unit.one_process import session

keras = tf.keras
TEXT = "train_step(x float32[4]) x 2"
SESSION = object()


def test_a_new_trace_begins_with_the_seeds() -> None:
    counters = RandomCounters()
    for i in range(2):
        make = counters.of_trace(SESSION, TEXT)
        assert make("0 RandomUniform", 7, -8).numpy().tolist() == [0, -8, 7]
        states = counters.states()
        assert states.pop(f"{TEXT} #{i}") == {"0 RandomUniform": [0, -8, 7]}
    assert counters.of_trace(SESSION, "no numbers") and len(counters.states()) == 2


def test_without_seeds_they_are_drawn_once() -> None:
    make = RandomCounters().of_trace(SESSION, TEXT)
    values = [make(str(i), 0, 0).numpy() for i in range(3)]
    assert [value[0] for value in values] == [0, 0, 0]
    assert len({int(number) for value in values for number in value[1:]}) == 6


def test_states_wait_for_their_trace() -> None:
    states = {
        f"{TEXT} #1": {"0 RandomUniform": [256, 1, 2], "9 Gone": [1, 1, 1]},
        "other #0": {"0 RandomUniform": [512, 3, 4]},
    }
    counters = RandomCounters()
    counters.take_over(json.loads(json.dumps(states)))
    assert counters.states() == states
    first, second = (counters.of_trace(SESSION, TEXT) for _ in range(2))
    assert first("0 RandomUniform", 7, 8).numpy().tolist() == [0, 8, 7]
    assert second("0 RandomUniform", 7, 8).numpy().tolist() == [256, 1, 2]
    assert second("1 RandomUniform", 7, 8).numpy().tolist() == [0, 8, 7]
    # What this rank does not run after all is forgotten.
    assert counters.states() == {
        f"{TEXT} #0": {"0 RandomUniform": [0, 8, 7]},
        f"{TEXT} #1": {"0 RandomUniform": [256, 1, 2], "1 RandomUniform": [0, 8, 7]},
        "other #0": {"0 RandomUniform": [512, 3, 4]},
    }


def test_what_was_not_saved_begins_anew() -> None:
    counters = RandomCounters()
    old, new = (
        counters.of_trace(SESSION, TEXT)("0 RandomUniform", 7, 8) for _ in range(2)
    )
    old.assign([256, 8, 7])
    states = counters.states()
    del states[f"{TEXT} #1"]
    for counter in (old, new):
        counter.assign([999, 9, 9])
    counters.take_over(states)
    assert (old.numpy().tolist(), new.numpy().tolist()) == ([256, 8, 7], [0, 8, 7])


def test_another_session_traces_again() -> None:
    counters = RandomCounters()
    counters.of_trace(SESSION, TEXT)("0 RandomUniform", 7, 8).assign([256, 8, 7])
    counters.of_trace(object(), TEXT)("0 RandomUniform", 7, 8)
    assert counters.states() == {f"{TEXT} #0": {"0 RandomUniform": [0, 8, 7]}}


# --- in steps -------------------------------------------------------------------------


class Noisy:
    """What a model of any class does, with all four operations and several dtypes."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = keras.layers.Dropout(0.5, seed=3)
        self.half = keras.layers.GaussianDropout(0.5, seed=4, dtype="float16")
        self.noise = keras.layers.GaussianNoise(1.0, seed=5, dtype="float64")

    def call(self, x: Any, training: Any = None) -> Any:
        y = self.drop(x, training=training) + tf.random.truncated_normal([3], seed=6)
        y += tf.cast(self.half(x, training=training), y.dtype)
        y += tf.cast(self.noise(x, training=training), y.dtype)
        return y * tf.random.uniform(tf.shape(x), 1, 9, tf.float32, seed=7) * tf.cast(
            tf.random.uniform([], 1, 99, tf.int32, seed=8), y.dtype
        )


class Ours(Noisy, smp.DistributedModel):  # type: ignore[misc]
    pass


class Plain(Noisy, keras.Model):  # type: ignore[misc]
    pass


def step_of(model: Any) -> Any:
    def step(x: Any) -> Any:
        return model(x, training=True)

    return step


@pytest.mark.parametrize("xla", [False, True])
@pytest.mark.parametrize("static", [True, False])
def test_a_step_draws_what_plain_tensorflow_draws(xla: bool, static: bool) -> None:
    # Two sizes: plain TensorFlow begins anew with the second, as it is traced again.
    batches = [tf.ones([rows, 3]) for rows in (4, 4, 2, 4, 2)]
    spec = tf.TensorSpec([None, 3])
    tf.random.set_seed(5)
    with session(microbatches=2, xla=xla):
        signature = None if static else [spec]
        step = smp.step(step_of(Ours()), input_signature=signature)
        found = [step(x).outputs for x in batches]
    tf.random.set_seed(5)
    truth = tf.function(step_of(Plain()), signature)
    for outputs, x in zip(found, batches, strict=True):
        for output, piece in zip(outputs, tf.split(x, 2), strict=True):
            # XLA rounds sums and products in its own way, where it fuses them.
            tolerance = 1e-6 if xla else 0
            np.testing.assert_allclose(output, truth(piece), tolerance)


def test_a_session_leaves_functions_that_call_its_steps_alone() -> None:
    """Nor does a creator of variables see a counter, or a model have it."""
    seen: list[Any] = []

    def creator(following: Any, **kwargs: Any) -> Any:
        seen.append(kwargs)
        return following(**kwargs)

    with session(microbatches=2):
        model = Ours()
        step = smp.step(step_of(model))
        function = tf.function(lambda x: step(x).stack())
        with tf.variable_creator_scope(creator):
            function(tf.ones([4, 3]))
        assert not seen and not model.variables and not model.submodules[0].variables
        (states,) = counters_of(model).states().values()
        assert len(states) == 6
    with session(microbatches=2):
        function(tf.ones([4, 3]))
