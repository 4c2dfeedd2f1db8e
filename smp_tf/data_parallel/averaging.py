"""Means over the dp_group, on all its ranks: by Horovod, or between GPUs by NCCL.

Horovod's wheel adds up in the memory of the host (0.28.1 does not build its operations
for GPUs with a TensorFlow of today), so that dense gradients on GPUs go by our own.

Horovod knows a tensor by the name of its operation, which must be the same on all
ranks, whatever else they have traced; and no two of a name may be under way at once.
So each bucket is a function that exists once, with one name, and its calls take turns.
Nothing orders the buckets among each other: each waits for its own gradients only.
"""

from typing import Any

import tensorflow as tf

from smp_tf.data_parallel.buckets import Bucket
from smp_tf.data_parallel.vectors import as_before, as_known, divided, joined
from smp_tf.runtime import gpu_sums, session
from smp_tf.runtime.collectives import in_turns, new_turn


def mean_of(bucket: Bucket, compression: Any, name: str) -> Any:
    """A ConcreteFunction: the gradients of a bucket -> their means over the dp_group.

    IndexedSlices come as (values, indices), and leave so, with the rows of all ranks.

    Args:
        compression: one of ``hvd.Compression``.
        name: for Horovod; the same on all ranks.
    """
    if bucket.first.index_dtype:
        body = _of_slices(name)
    else:
        group = gpu_sums.group_for(session.DP_GROUP, tf.as_dtype(bucket.first.dtype))
        if group is not None:
            return in_turns(
                name,
                gpu_sums.turn(),
                _on_gpus(compression, group, name),
                specs_of(bucket),
                device=None,
            )
        body = _of_dense(compression, name)
    turn = new_turn(f"{name}_turn")
    # Not an operation of ours: it may be on a GPU.
    return in_turns(name, turn, body, specs_of(bucket), device=None)


def specs_of(bucket: Bucket) -> list[tf.TensorSpec]:
    """What a function of the gradients of a bucket takes."""
    specs = [tf.TensorSpec(part.shape, part.dtype) for part in bucket.parts]
    if bucket.first.index_dtype:
        specs.append(tf.TensorSpec([None], bucket.first.index_dtype))
    return specs


def _of_dense(compression: Any, name: str) -> Any:
    import horovod.tensorflow as hvd

    def body(*gradients: tf.Tensor) -> tuple[list[tf.Tensor], list[tf.Operation]]:
        vector, restore = compressed(gradients, compression)
        mean = hvd.allreduce(
            as_known(vector), op=hvd.Average, name=name, ignore_name_scope=True
        )
        return restore(as_before(mean, vector.dtype)), [mean.op]

    return body


def _on_gpus(compression: Any, group: int, name: str) -> Any:
    def body(*gradients: tf.Tensor) -> tuple[list[tf.Tensor], list[tf.Operation]]:
        vector, restore = compressed(gradients, compression)
        total, begun = gpu_sums.added_up(vector, group, name)
        return restore(total / tf.cast(session.dp_size(), vector.dtype)), [begun]

    return body


def _of_slices(name: str) -> Any:
    import horovod.tensorflow as hvd

    def all_rows(tensor: tf.Tensor, what: str) -> tf.Tensor:
        return hvd.allgather(tensor, name=f"{name}_{what}", ignore_name_scope=True)

    def body(
        values: tf.Tensor, indices: tf.Tensor
    ) -> tuple[list[tf.Tensor], list[tf.Operation]]:
        rows = all_rows(as_known(values), "values")
        places = all_rows(indices, "indices")
        mean = as_before(rows, values.dtype) / tf.cast(hvd.size(), values.dtype)
        return [mean, places], [rows.op, places.op]

    return body


def compressed(gradients: Any, compression: Any) -> tuple[tf.Tensor, Any]:
    """(gradients as one vector that travels, what makes gradients of such a one)."""
    small, contexts = zip(*[compression.compress(each) for each in gradients])
    shapes = [each.shape for each in small]

    def restore(vector: tf.Tensor) -> list[tf.Tensor]:
        every = zip(divided(vector, shapes), contexts, strict=True)
        return [compression.decompress(each, context) for each, context in every]

    return joined(small), restore
