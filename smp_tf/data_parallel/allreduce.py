"""``smp.allreduce``: the mean or the sum of a tensor over a group of ranks."""

from typing import Any

import tensorflow as tf

from smp_tf.frontend.hooks import graphs
from smp_tf.runtime import collectives, gpu_sums, session
from smp_tf.runtime.session import CommGroup

_OPS = ("mean", "sum")
_LABEL = "an allreduce"


@graphs.unconverted
def allreduce(
    tensor: Any, group: CommGroup = session.DP_GROUP, op: str = "mean"
) -> tf.Tensor:
    """The mean of a tensor over the ranks of a group, or the sum.

        loss = smp.allreduce(losses.reduce_mean())         # over the replicas
        seen = smp.allreduce(count, smp.WORLD, op="sum")

    As ``hvd.allreduce`` it averages unless told otherwise; unlike that it knows any
    group, needs no ``horovod: true``, and gives all ranks the same bits, added up in
    the order of the group. Gradients go through it: that of an allreduce is the same
    allreduce of the gradients. Between GPUs it goes by NCCL, which adds up in an order
    of its own. For the gradients of a model see ``smp.DistributedOptimizer``.

    Every rank of the group calls it, in the same order among its calls, eagerly or
    inside a ``tf.function``.

    Args:
        tensor: what converts to a tensor, of the same type and shape on all ranks;
            IndexedSlices are made dense.
        op: "mean" or "sum".

    Raises:
        NotInitializedError: before ``smp.init()``.
        ValueError: there is no such group or ``op``.
        TypeError: the type has no sum; or, for a mean, is one of integers.
        SmpError: inside a step, where tensors are those of one microbatch.
        tf.errors.OpError: when it runs: a rank failed, did not come within timeout_s,
            or has another type or shape; named.
    """
    session.current("allreduce")
    collectives.refuse_in_step("smp.allreduce")
    size = len(collectives.members(group))
    if op not in _OPS:
        raise ValueError(f"smp.allreduce: op must be one of {_OPS}: op={op!r}")
    value = tf.convert_to_tensor(tensor)
    dtype = value.dtype
    if not (dtype.is_floating or dtype.is_complex or dtype.is_integer):
        raise TypeError(
            f"smp.allreduce adds numbers up: dtype={dtype.name}; cast them, as in"
            " tf.cast(flags, tf.int32), or use smp.allgather"
        )
    if op == "mean" and dtype.is_integer:
        raise TypeError(
            f"the mean of integers is none of them: dtype={dtype.name} op='mean'; cast"
            " the tensor to a floating type, or say op='sum'"
        )

    @tf.custom_gradient
    def reduced(value: tf.Tensor) -> Any:
        total = _sum(value, group)
        if op == "mean":
            total = total / tf.cast(size, dtype)
        return total, lambda upstream: allreduce(upstream, group, op)

    return tf.identity(reduced(value))


def _sum(value: tf.Tensor, group: CommGroup) -> tf.Tensor:
    number = None
    if value.shape.is_fully_defined():
        number = gpu_sums.group_for(group, value.dtype)
    if number is None:
        return collectives.group_sum(value, group, _LABEL)
    return gpu_sums.total(value, group, number, _LABEL)
