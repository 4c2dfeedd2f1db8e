"""The truth: what ``smp.step`` means, by plain TensorFlow in one process."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.runtime.step_output import StepOutput


def plain_step(count: int) -> Callable[..., Any]:
    """A decorator with the arguments of ``smp.step``: one ``tf.function``, called for
    one microbatch after the other.

    Args:
        count: microbatches.
    """
    return functools.partial(_decorate, count)


def _decorate(
    count: int,
    function: Callable[..., Any] | None = None,
    *,
    non_split_inputs: Sequence[str] = (),
    input_split_axes: Mapping[str, int] | None = None,
    input_signature: Sequence[tf.TensorSpec] | None = None,
) -> Any:
    """
    Args:
        input_signature: with batches of unknown size: it holds for a microbatch too.
    """
    if function is None:
        return functools.partial(
            _decorate,
            count,
            non_split_inputs=non_split_inputs,
            input_split_axes=input_split_axes,
            input_signature=input_signature,
        )
    traced = tf.function(function, input_signature=input_signature)
    names = list(inspect.signature(function).parameters)
    axes = dict(input_split_axes or {})

    def part(name: str, mb: int, value: Any) -> Any:
        if name in non_split_inputs or not tf.is_tensor(value):
            return value
        return tf.split(value, count, axes.get(name, 0))[mb]

    @tf.autograph.experimental.do_not_convert
    def call(*args: Any) -> Any:
        each = []
        for mb in range(count):
            parts = [
                tf.nest.map_structure(functools.partial(part, name, mb), value)
                for name, value in zip(names, args)
            ]
            each.append(traced(*parts))
        return tf.nest.map_structure(_joined, *each)

    return call


def _joined(*values: Any) -> Any:
    """A tensor as a StepOutput of all microbatches; anything else as it is."""
    return StepOutput(values) if tf.is_tensor(values[0]) else values[0]
