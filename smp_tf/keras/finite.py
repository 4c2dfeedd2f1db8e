"""Whether all gradients are finite, told to the LossScaleOptimizer of every rank."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from smp_tf.runtime.clipping import values_of


def num_not_finite(gradients: Sequence[Any]) -> tf.Tensor:
    """How many gradients of this rank hold NaN or infinity: a float64 scalar."""
    found = [
        tf.logical_not(tf.reduce_all(tf.math.is_finite(values_of(gradient))))
        for gradient in gradients
        if gradient is not None
    ]
    return tf.math.count_nonzero(found, dtype=tf.float64)


def with_nan_if(is_bad: tf.Tensor, gradients: Sequence[Any]) -> list[Any]:
    """The gradients, with a NaN among them if ``is_bad``.

    A LossScaleOptimizer looks at this rank's gradients only; so it skips the update
    and halves the scale where any rank would. The smallest gradient is taken, which is
    copied for it.
    """
    changed = list(gradients)
    given = [i for i, gradient in enumerate(gradients) if gradient is not None]
    place = min(given, key=lambda i: _cost_of_copy(gradients[i]))
    gradient = gradients[place]
    if isinstance(gradient, tf.IndexedSlices):
        changed[place] = _with_nan_row_if(is_bad, gradient)
    else:
        nan = tf.constant(float("nan"), gradient.dtype)
        changed[place] = tf.where(is_bad, nan, gradient)
    return changed


def _cost_of_copy(gradient: Any) -> tuple[int, int]:
    """Dense ones first, the smallest of known size before the others; an empty one,
    which has no place for a NaN, last."""
    if isinstance(gradient, tf.IndexedSlices):
        return 2, 0
    size = gradient.shape.num_elements()
    if size is None:
        return 1, 0
    return (0, size) if size else (3, 0)


def _with_nan_row_if(is_bad: tf.Tensor, gradient: Any) -> tf.IndexedSlices:
    """One more row where there may be none to change: no row of a batch may have met
    the embedding. It is never applied."""
    row = tf.fill([tf.cast(is_bad, tf.int32)], 0)
    nans = tf.fill(
        tf.concat([tf.shape(row), tf.shape(gradient.values)[1:]], 0),
        tf.constant(float("nan"), gradient.values.dtype),
    )
    return tf.IndexedSlices(
        tf.concat([gradient.values, nans], 0),
        tf.concat([gradient.indices, tf.cast(row, gradient.indices.dtype)], 0),
        gradient.dense_shape,
    )
