"""``smp.clip_by_global_norm``: the norm over the variables of all partitions."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from smp_tf.frontend.hooks import graphs
from smp_tf.runtime import collectives, session


@graphs.unconverted
def clip_by_global_norm(
    t_list: Sequence[Any],
    clip_norm: Any,
    use_norm: Any = None,
    name: str | None = None,
) -> tuple[list[Any], tf.Tensor]:
    """As ``tf.clip_by_global_norm``, with the norm of the tensors of all partitions.

    For what ``accumulate()`` gives of the gradients that a step returned. Every rank of
    the pp_group calls it with its own tensors, eagerly or inside a ``tf.function``; the
    list may be empty.

    With replicas, clip gradients that are averaged: after ``hvd.allreduce``. What goes
    into a ``smp.DistributedOptimizer`` is not, and each replica would clip its own by
    the norm of its own; give that optimizer a ``global_clipnorm``, which clips the
    means.

    Args:
        t_list: Tensors, IndexedSlices (their values count, as in TensorFlow) and Nones.
        clip_norm: the most that the norm may be.
        use_norm: the norm, if it is known; on all ranks. Nothing is summed up then.
        name: of the operations.

    Returns:
        (the tensors, each times clip_norm / max(norm, clip_norm), the norm). The norm
        is a scalar with the same bits on all ranks, of the type of the first tensor
        (of Keras's floatx where there is none). It is infinite or NaN where a tensor of
        any rank is, and all tensors of all ranks become NaN.

    Raises:
        NotInitializedError: before ``smp.init()``.
        SmpError: inside a step, where the gradients are not complete.
        TypeError: ``t_list`` is no sequence.
        tf.errors.OpError: when it runs: a rank failed or did not come; named.
    """
    session.current("clip_by_global_norm")
    collectives.refuse_in_step("smp.clip_by_global_norm")
    is_list = isinstance(t_list, Sequence) and not isinstance(t_list, str)
    if is_list and use_norm is None and session.pp_size() > 1:
        half = collectives.pipeline_sum(half_squared_norm(t_list), "the global norm")
        use_norm = norm_of(half, t_list)
    clipped, norm = tf.clip_by_global_norm(t_list, clip_norm, use_norm, name)
    return clipped, norm


def half_squared_norm(tensors: Sequence[Any]) -> tf.Tensor:
    """Half the sum of squares, a float64 scalar on every rank.

    Float64, because ranks without tensors know of no other type that all would agree
    on; and the sum over many tensors loses nothing. That within a tensor is
    TensorFlow's, in its own type.
    """
    halves = [
        tf.cast(tf.nn.l2_loss(values_of(tensor)), tf.float64)
        for tensor in tensors
        if tensor is not None
    ]
    return tf.add_n(halves) if halves else tf.zeros([], tf.float64)


def norm_of(half: tf.Tensor, tensors: Sequence[Any]) -> tf.Tensor:
    """The norm from half the sum of squares, in the type of the tensors it scales."""
    types = [values_of(tensor).dtype for tensor in tensors if tensor is not None]
    dtype = types[0] if types else tf.as_dtype(tf.keras.backend.floatx())
    return tf.cast(tf.sqrt(2.0 * half), dtype)


def values_of(gradient: Any) -> tf.Tensor:
    """The tensor, or what IndexedSlices hold."""
    is_sparse = isinstance(gradient, tf.IndexedSlices)
    return tf.convert_to_tensor(gradient.values if is_sparse else gradient)
