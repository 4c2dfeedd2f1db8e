"""What the ranks of a dp_group exchange for an update, agreed on once.

The ranks compare what they have before the first update of a kind, and choose numbers
that none of them has in use. The exchange then exists as long as the session, and every
update with such gradients runs through it, traced again or not, in whatever function.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.data_parallel import sharding
from smp_tf.data_parallel.averaging import mean_of
from smp_tf.data_parallel.buckets import Bucket, Part, buckets_of
from smp_tf.data_parallel.owning import mean_at_owner, values_of_owner
from smp_tf.errors import SmpError
from smp_tf.frontend.hooks import graphs
from smp_tf.runtime import session
from smp_tf.runtime.channels import replica_channels

_CHANNELS = 2  # of a bucket


class Exchange:
    """Gradients to the ranks that update with them, and values from there."""

    def __init__(
        self,
        gradients: Sequence[Part | None],
        values: Sequence[Part | None],
        names: Sequence[str],
        compression: Any,
    ) -> None:
        self._buckets = buckets_of(gradients)
        self._value_buckets = buckets_of(values)
        self._names = names
        self._compression = compression
        self._first = 0
        self._functions: dict[int, Any] = {}

    @property
    def num_channels(self) -> int:
        return _CHANNELS * (len(self._buckets) + len(self._value_buckets))

    def begin(self, first_channel: int) -> None:
        """Set the first of the numbers that this exchange, and no other, has."""
        self._first = first_channel

    def averaged(self, gradients: Sequence[Any]) -> list[Any]:
        """Their means over the dp_group; None for those that another rank owns."""
        found: list[Any] = [None] * len(gradients)
        for number, bucket in enumerate(self._buckets):
            function = self._function(number, bucket, self._mean)
            given = [gradients[place] for place in bucket.places]
            with graphs.without_tapes():
                means = function(*_flat(given, bucket))
            for place, mean in zip(bucket.places, _like(given, means or [])):
                found[place] = mean
        return found

    def spread(self, variables: Sequence[tf.Variable]) -> None:
        """Set variables to the values that they have on their owners."""
        for number, bucket in enumerate(self._value_buckets, len(self._buckets)):
            function = self._function(number, bucket, self._values)
            mine = [variables[place] for place in bucket.places]
            is_owner = bucket.first.owner == session.dp_rank()
            given = [variable.read_value() for variable in mine] if is_owner else []
            with graphs.without_tapes():
                values = function(*given)
            for variable, value in zip(mine, values or []):
                variable.assign(value, read_value=False)

    def _function(
        self, number: int, bucket: Bucket, make: Callable[[Bucket, int, str], Any]
    ) -> Any:
        if number not in self._functions:
            first, more = self._names[bucket.places[0]], len(bucket.places) - 1
            label = f"{first} and {more} more" if more else first
            with graphs.outside_of_graphs():
                channel = self._first + _CHANNELS * number
                self._functions[number] = make(bucket, channel, label)
        return self._functions[number]

    def _mean(self, bucket: Bucket, channel: int, label: str) -> Any:
        if bucket.first.owner is None:
            return mean_of(bucket, self._compression, f"smp_mean_{channel}")
        label = f"the gradient of {label}"
        return mean_at_owner(bucket, self._compression, channel, label)

    def _values(self, bucket: Bucket, channel: int, label: str) -> Any:
        return values_of_owner(bucket, channel, f"the new value of {label}")


def exchange_for(
    gradients: Sequence[Any], variables: Sequence[tf.Variable], compression: Any = None
) -> Exchange:
    """The exchange for such gradients of these variables.

    All ranks of the dp_group call it in the same order, with gradients of the same kind
    for their copies of the same variables.

    Args:
        gradients: Tensors, IndexedSlices and Nones.
        compression: one of ``hvd.Compression``; None for none.

    Raises:
        SmpError: on every rank of the dp_group, they have other variables or gradients.
        TransportError: a rank failed, or did not come within timeout_s.
    """
    return _exchanges.get(gradients, variables, compression)


class _Exchanges:
    """Those of the current session."""

    def __init__(self) -> None:
        self._session: Any = None
        self._known: dict[Any, Exchange] = {}

    def get(self, gradients: Any, variables: Any, compression: Any) -> Exchange:
        current = session.current("DistributedOptimizer")
        if self._session is not current:
            self._session, self._known = current, {}
        compression = compression or _no_compression()
        is_sharded = sharding.is_sharded()
        every = sharding.owners(variables) if is_sharded else [None] * len(variables)
        pairs = list(zip(gradients, variables, every, strict=True))
        parts = tuple(_gradient_part(*each) for each in pairs)
        values = tuple(_value_part(*each) for each in pairs if is_sharded)
        key = (parts, values, compression)
        if key not in self._known:
            names = [variable.name for variable in variables]
            made = Exchange(parts, values, names, compression)
            shown = [
                f"{name} {part or 'without a gradient'}"
                for name, part in zip(names, parts)
            ]
            _agree(made, f"{parts} {values} {compression.__name__}", shown)
            self._known[key] = made
        return self._known[key]


_exchanges = _Exchanges()


def _agree(made: Exchange, kinds: str, shown: list[str]) -> None:
    """Compare with the dp_group, and choose numbers that are free on all its ranks.

    Args:
        kinds: what must be the same.
        shown: the same for people, a line for each variable.
    """
    current = session.current("DistributedOptimizer")
    mine = kinds, shown, replica_channels.first_free(current)
    found = session.allgather(mine, session.DP_GROUP)
    if any(theirs != kinds for theirs, _, _ in found):
        ranks = session.get_dp_group()
        each = "; ".join(
            f"rank {rank}: {_first_other(lines, [lines for _, lines, _ in found])}"
            for rank, (_, lines, _) in zip(ranks, found)
        )
        raise SmpError(
            "all ranks of a dp_group must train the same variables, in the same order,"
            f" with gradients of the same kind, compressed alike: {each}; make the"
            " model, the loss and the optimizer in code that all ranks run alike"
        )
    free = max(first for _, _, first in found)
    made.begin(replica_channels.take(current, made.num_channels, at_least=free))


def _first_other(lines: list[str], every: list[list[str]]) -> str:
    """The first line in which the ranks differ."""
    shortest = min(map(len, every))
    for i in range(shortest):
        if any(each[i] != lines[i] for each in every):
            return lines[i]
    return f"{len(lines)} variables"  # or another compression


# --- gradients as tensors


def _gradient_part(gradient: Any, variable: Any, owner: int | None) -> Part | None:
    if gradient is None:
        return None
    if isinstance(gradient, tf.IndexedSlices):
        shape = (None, *_sizes(variable.shape[1:]))
        index_dtype = gradient.indices.dtype.name
        return Part(shape, gradient.values.dtype.name, None, owner, index_dtype)
    return _part(variable.shape, tf.as_dtype(gradient.dtype), owner)


def _value_part(gradient: Any, variable: Any, owner: int | None) -> Part | None:
    if gradient is None:
        return None
    return _part(variable.shape, variable.dtype.base_dtype, owner)


def _part(shape: tf.TensorShape, dtype: tf.DType, owner: int | None) -> Part:
    count = shape.num_elements()
    num_bytes = None if count is None else count * dtype.size
    sizes = None if shape.rank is None else _sizes(shape)
    return Part(sizes, dtype.name, num_bytes, owner)


def _sizes(shape: tf.TensorShape) -> tuple[int | None, ...]:
    return tuple(shape.as_list())


def _flat(gradients: Sequence[Any], bucket: Bucket) -> list[tf.Tensor]:
    """What the functions of a bucket take."""
    if bucket.first.index_dtype:
        (slices,) = gradients
        return [slices.values, slices.indices]
    return [
        tf.ensure_shape(tf.convert_to_tensor(gradient), part.shape)
        for gradient, part in zip(gradients, bucket.parts)
    ]


def _like(gradients: Sequence[Any], means: Sequence[tf.Tensor]) -> list[Any]:
    """What such a function returns, as gradients; nothing of nothing."""
    if means and isinstance(gradients[0], tf.IndexedSlices):
        values, indices = means
        return [tf.IndexedSlices(values, indices, gradients[0].dense_shape)]
    return list(means)


def _no_compression() -> Any:
    import horovod.tensorflow as hvd

    return hvd.Compression.none
