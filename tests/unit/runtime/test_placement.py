"""Wishes for a placement, and hooks that wait for the decision."""

import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.runtime import placement
from smp_tf.runtime.placement import Placement
from tests.unit.one_process import session


@pytest.fixture(autouse=True)
def nothing_is_waiting() -> Iterator[None]:
    """Hooks and the warning are kept per process."""
    smp.shutdown()
    placement._warn_ignored.cache_clear()
    yield
    placement._waiting.clear()
    smp.shutdown()


class Tiny(smp.DistributedModel):
    def __init__(self) -> None:
        super().__init__(name="tiny")
        self.dense = tf.keras.layers.Dense(2)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.dense(x)


class Placed(Tiny):
    def call(self, x: tf.Tensor) -> tf.Tensor:
        with smp.partition(0):
            return self.dense(x)


def step_of(model: smp.DistributedModel) -> Any:
    return smp.step(lambda x: model(x))


@pytest.mark.parametrize("index", [1, -1, True, "0", 0.0, None])
def test_partition_takes_an_index_that_exists(index: object) -> None:
    with session():
        with pytest.raises(smp.PartitionError, match=f"index={index!r}"):
            with smp.partition(index):  # type: ignore[arg-type]
                pytest.fail("entered")


def test_partition_needs_a_session() -> None:
    with pytest.raises(smp.NotInitializedError):
        with smp.partition(0):
            pytest.fail("entered")


def test_partition_is_ignored_with_one_warning() -> None:
    with session():
        with pytest.warns(UserWarning, match="auto_partition is true.*default_part"):
            step = step_of(Placed())
            step(tf.ones([1, 3]))
        with warnings.catch_warnings(action="error", category=UserWarning):
            step(tf.ones([2, 3]))  # traced again


def test_partition_is_followed_in_silence_when_it_decides() -> None:
    with session(auto_partition=False, default_partition=0):
        model = Placed()
        with warnings.catch_warnings(action="error", category=UserWarning):
            step_of(model)(tf.ones([1, 3]))
        assert set(model.placement.owner.values()) == {0}


def test_hooks_wait_for_the_partition_then_run_at_once() -> None:
    calls = []

    @smp.register_post_partition_hook
    def hook(*args: object, **kwargs: object) -> str:
        """Load something."""
        assert tf.executing_eagerly()
        calls.append((args, kwargs))
        return "result"

    assert hook.__name__ == "hook" and hook.__doc__ == "Load something."
    with session():
        model = Tiny()
        traced_before = []

        @smp.step
        def step(x: tf.Tensor) -> tf.Tensor:
            traced_before.append(len(calls))
            return model(x)

        assert hook(1, key=2) is None
        assert hook(3) is None
        assert not calls
        step.plan(tf.ones([2, 3]))
        assert calls == [((1,), {"key": 2}), ((3,), {})]
        step(tf.ones([2, 3]))
        assert len(calls) == 2, "a hook ran twice"
        assert hook(4) == "result" and calls[-1] == ((4,), {})
    with pytest.raises(smp.NotInitializedError, match="register_post_partition_hook"):
        hook(5)
    with session():  # another session: nothing is partitioned yet
        assert hook(6) is None and len(calls) == 3
        step_of(Tiny())(tf.ones([1, 3]))
        assert calls[-1] == ((6,), {})


def test_hooks_run_eagerly_inside_a_function_and_before_the_first_forward() -> None:
    with session():
        model = Tiny()
        step = smp.step(lambda x: model(x))

        @smp.register_post_partition_hook
        def load() -> None:
            assert tf.executing_eagerly()
            model.variables[0].assign(tf.fill([3, 2], 2.0))

        load()
        result = tf.function(lambda x: step(x).merge())(tf.ones([1, 3]))
        assert result.numpy().tolist() == [[6.0, 6.0]]


def test_hooks_of_a_session_that_ended_do_not_run_in_the_next() -> None:
    calls = []
    hook = smp.register_post_partition_hook(lambda: calls.append(1))
    with session():
        hook()
    with session():
        step_of(Tiny())(tf.ones([1, 3]))
    assert not calls


def test_what_was_decided_stays() -> None:
    first = Placement(None, {1: 0, 2: 1}, {"a": 0})
    later = first.extended({2: 0, 3: 1}, {"a": 1, "b": 1})
    assert later.owner == {1: 0, 2: 1, 3: 1}
    assert later.partition_of_layer == {"a": 0, "b": 1}
    assert not later.is_current()
