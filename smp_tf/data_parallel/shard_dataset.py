"""``smp.shard_dataset``: each replica of the model trains on its part of the data."""

import tensorflow as tf

from smp_tf.errors import ConfigError
from smp_tf.runtime import session


def shard_dataset(
    dataset: tf.data.Dataset, drop_remainder: bool = True
) -> tf.data.Dataset:
    """Every dp_size-th element of ``dataset``, beginning with that of this dp_rank.

        data = smp.shard_dataset(tf.data.Dataset.from_tensor_slices((x, y)))
        data = data.shuffle(10_000, seed=1).batch(64)

    All ranks of an mp_group get the same elements. Call it before ``shuffle``, or after
    one whose order is the same on all ranks, else some elements are seen twice and
    others never; and before ``batch``, so that the parts are as equal as can be.
    Without data parallelism it returns the dataset itself.

    Args:
        drop_remainder: leave out the last elements where they are not enough for all,
            if the size of the dataset is known: replicas train on as many batches. For
            an evaluation say False.

    Raises:
        NotInitializedError: before ``smp.init()``.
        ConfigError: it is no ``tf.data.Dataset``.
    """
    session.current("shard_dataset")
    if not isinstance(dataset, tf.data.Dataset):
        raise ConfigError(
            "smp.shard_dataset takes a tf.data.Dataset:"
            f" type={type(dataset).__name__}; slice arrays by smp.dp_rank(), as in"
            " x[smp.dp_rank() :: smp.dp_size()]"
        )
    if session.dp_size() == 1:
        return dataset
    count, size = int(dataset.cardinality()), session.dp_size()
    if drop_remainder and count > 0 and count % size:
        dataset = dataset.take(count - count % size)
    return dataset.shard(size, session.dp_rank())
