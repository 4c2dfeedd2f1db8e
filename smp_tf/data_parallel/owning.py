"""Means of gradients on the rank that owns a variable, and its values from there.

    rank 0   gradient of a ->  mean of a, update of a -> a
                           <-> mean of b, update of b <->
    rank 1   gradient of b ->                        <-  b

Directly over our own transport: what belongs to one rank goes to that rank in one hop,
and it adds up in the order of the ranks. As in ``averaging``, each bucket is a function
whose calls take turns, and waits for nothing but its own.
"""

from typing import Any

import tensorflow as tf

from smp_tf.data_parallel.averaging import compressed, specs_of
from smp_tf.data_parallel.buckets import Bucket
from smp_tf.data_parallel.vectors import divided, joined
from smp_tf.runtime import session
from smp_tf.runtime.collectives import Link, in_turns, new_turn
from smp_tf.runtime.lower import noinline

_Body = tuple[list[tf.Tensor], list[tf.Operation]]


def mean_at_owner(bucket: Bucket, compression: Any, channel: int, label: str) -> Any:
    """A ConcreteFunction: the gradients of a bucket -> their means, on their owner;
    -> nothing, on the other ranks of the dp_group.

    IndexedSlices come as (values, indices), and leave so, with the rows of all ranks.

    Args:
        channel: the first of two.
    """
    link, second = Link(channel, label), Link(channel + 1, label)

    def of_dense(*gradients: tf.Tensor) -> _Body:
        vector, restore = compressed(gradients, compression)
        if not _is_owner(bucket):
            return [], [_sent(bucket, vector, link)]
        mean = _added_up(vector, link) / tf.cast(session.dp_size(), vector.dtype)
        return restore(mean), [mean.op]

    def of_slices(values: tf.Tensor, indices: tf.Tensor) -> _Body:
        if not _is_owner(bucket):
            sent = [_sent(bucket, values, link), _sent(bucket, indices, second)]
            return [], sent
        rows, places = _of_all(values, link), _of_all(indices, second)
        mean = tf.concat(rows, 0) / tf.cast(len(rows), values.dtype)
        outputs = [mean, tf.concat(places, 0)]
        return outputs, [output.op for output in outputs]

    body = of_slices if bucket.first.index_dtype else of_dense
    return in_turns("smp_mean", new_turn("smp_mean_turn"), body, specs_of(bucket))


def values_of_owner(bucket: Bucket, channel: int, label: str) -> Any:
    """A ConcreteFunction: the values of a bucket, on their owner -> nothing; on the
    other ranks of the dp_group, nothing -> the values."""
    link, group = Link(channel, label), session.get_dp_group()
    owner = group[bucket.first.owner or 0]
    specs = specs_of(bucket)

    def give(*values: tf.Tensor) -> _Body:
        vector = joined(values)
        sent = [link.send(vector, peer) for peer in group if peer != owner]
        with tf.control_dependencies(sent):
            return [], [link.flush()]

    def take() -> _Body:
        shapes = [spec.shape for spec in specs]
        length = sum(shape.num_elements() or 0 for shape in shapes)
        shape = shapes[0] if len(shapes) == 1 else tf.TensorShape([length])
        vector = link.receive(specs[0].dtype, shape, owner)
        return divided(vector, shapes), [vector.op]

    is_mine = owner == session.rank()
    return in_turns(
        "smp_values",
        new_turn("smp_values_turn"),
        give if is_mine else take,
        specs if is_mine else [],
    )


def _is_owner(bucket: Bucket) -> bool:
    return bucket.first.owner == session.dp_rank()


def _added_up(mine: tf.Tensor, link: Link) -> tf.Tensor:
    """The sum of what the ranks of the dp_group have, added up in their order. Each is
    received when the one before is added, so that one at a time is in memory."""
    # In calls, or TensorFlow would make an AddN of several, which begins with whichever
    # input it may overwrite: other last bits, now and then.
    spec = tf.TensorSpec(mine.shape, mine.dtype)
    add = noinline(lambda total, value: total + value, [spec, spec])
    total = None
    for peer in session.get_dp_group():
        with tf.control_dependencies([] if total is None else [total.op]):
            value = mine if peer == session.rank() else _from(peer, mine, link)
        total = value if total is None else add(total, value)
    return total


def _of_all(mine: tf.Tensor, link: Link) -> list[tf.Tensor]:
    """What each rank of the dp_group has, in their order."""
    return [
        mine if peer == session.rank() else _from(peer, mine, link)
        for peer in session.get_dp_group()
    ]


def _from(peer: int, like: tf.Tensor, link: Link) -> tf.Tensor:
    return link.receive(like.dtype, like.shape, peer)


def _sent(bucket: Bucket, mine: tf.Tensor, link: Link) -> tf.Operation:
    """Elsewhere: an operation that is over when the value has left."""
    sent = link.send(mine, session.get_dp_group()[bucket.first.owner or 0])
    with tf.control_dependencies([sent]):
        return link.flush()
