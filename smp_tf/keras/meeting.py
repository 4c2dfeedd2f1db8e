"""The ranks of an mp_group agree on what ``fit`` does next.

They all run the same script, so that each calls the same step with the same batch, and
each callback decides the same. Where one of them does not, the others would wait for it
in the middle of a pipeline. So they meet before every batch, for a fraction of a
millisecond, and say what they have come for:

    rank 0   ("train batch", 7, x: float32 [32, 28, 28, 1], y: int64 [32])
    rank 1   ("train batch", 7, x: float32 [32, 28, 28, 1], y: int64 [32])

All the same, and the step runs; anything else is an error on every rank that shows all.

With ``horovod: true`` the replicas of the model meet, too: they have other batches, but
go through the same number of them, for each waits for the gradients of the others.
"""

import contextlib
import contextvars
import logging
import os
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.errors import SmpError
from smp_tf.frontend.hooks import fitting
from smp_tf.frontend.hooks.initial_values import RandomState
from smp_tf.runtime import session

CHECKED_BATCHES = 2
"""The first ones of ``fit`` and ``evaluate``: their values are compared, and then those
of one batch in CHECKED_EVERY. A shuffle without a common seed shows at once."""

CHECKED_EVERY = 64

logger = logging.getLogger("smp_tf")

_is_open = contextvars.ContextVar("_is_open", default=False)
"""True inside ``fit`` and friends, which every rank has called."""


@contextlib.contextmanager
def opened(call: str, with_replicas: bool, **arguments: Any) -> Iterator[None]:
    """All ranks have called the same method of a model, with the same plain arguments.

    Inside, random states are those of the first rank of the mp_group: data that is
    shuffled by NumPy, Python or TensorFlow has the same order on all of them.

    Args:
        with_replicas: the ranks of all replicas must call it; otherwise those of a
            replica.

    Raises:
        SmpError: on every rank, where they differ.
        TransportError: a rank did not come within timeout_s, or failed.
    """
    with_replicas = with_replicas and are_replicas_in_step()
    if _is_open.get() or not (_is_needed() or with_replicas):
        yield
        return
    known = ", ".join(f"{key}={value!r}" for key, value in arguments.items())
    _agree_in_replica(f"{call}({known})")
    if with_replicas:
        _agree_between_replicas(f"{call}({known})")
    _share_random_states()
    token = _is_open.set(True)
    try:
        yield
    finally:
        _is_open.reset(token)


def _is_needed() -> bool:
    return session.mp_size() > 1


def are_replicas_in_step() -> bool:
    """Whether there are replicas of the model that train together."""
    return session.config().horovod and session.dp_size() > 1


def is_open() -> bool:
    """True inside ``fit`` and friends, which the other ranks have called, too."""
    return _is_open.get()


def agree(what: str) -> None:
    """Meet, for the same thing.

    Raises:
        SmpError: on every rank, with what each of them has come for.
        TransportError: a rank did not come within timeout_s, or failed.
    """
    _agree_in_replica(what)
    if are_replicas_in_step():
        _agree_between_replicas(what)


def _agree_in_replica(what: str) -> None:
    if not _is_needed():
        return
    found = session.allgather(what, session.MP_GROUP)
    if any(each != what for each in found):
        raise SmpError(
            "all ranks of an mp_group must run the same batches in the same order, and"
            f" the same calls: {_each(session.get_mp_group(), found)}; the ranks have"
            " other data, other shuffles (tf.keras.utils.set_random_seed), other"
            " callbacks (give all of them on every rank: files are written once) or"
            " other arguments"
        )


def _agree_between_replicas(what: str) -> None:
    found = session.allgather(what, session.DP_GROUP)
    if any(each != what for each in found):
        raise SmpError(
            "with horovod: true all replicas of a model must make the same calls, for"
            " as many batches, because each waits for the gradients of the others:"
            f" {_each(session.get_dp_group(), found)}; the data of the replicas has"
            " other lengths (smp.shard_dataset makes them equal; or say"
            " steps_per_epoch), or their arguments or callbacks differ"
        )


def _each(ranks: Sequence[int], found: Sequence[str]) -> str:
    return "; ".join(f"rank {rank}: {what}" for rank, what in zip(ranks, found))


def first_of(value: Any) -> Any:
    """The value that the first rank has, of all that train together; outside of ``fit``
    and the like, where other ranks need not come, this rank's own."""
    if not _is_open.get():
        return value
    value = session.allgather(value, session.MP_GROUP)[0]
    if are_replicas_in_step():
        value = session.allgather(value, session.DP_GROUP)[0]
    return value


def any_of(flag: bool) -> bool:
    """Whether a rank says True, of all that train together."""
    flag = any(session.allgather(bool(flag), session.MP_GROUP))
    if are_replicas_in_step():
        flag = any(session.allgather(flag, session.DP_GROUP))
    return flag


def next_batch(phase: str, number: int, source: Iterator[Any]) -> Any:
    """The next batch, when all ranks of the mp_group have it; in training, when all
    replicas have one.

    Args:
        phase: "train", "test" or "predict".
        number: of the batch in this run.

    Raises:
        StopIteration: none of the ranks has another one, or one of the replicas has
            none: the epoch is over for all of them.
        SmpError, TransportError: as ``agree``.
    """
    is_shared = phase == "train" and are_replicas_in_step()
    try:
        data = next(source)
    except StopIteration:
        _agree_in_replica(f"{phase} batch {number}: no more data")
        if is_shared:
            _meet_replicas(number, "")
        raise
    if not (_is_needed() or is_shared):
        return data
    checked = number < CHECKED_BATCHES or number % CHECKED_EVERY == 0
    described = _described(data, checked)
    _agree_in_replica(f"{phase} batch {number}: {described}")
    if is_shared and not _meet_replicas(number, described):
        raise StopIteration
    return data


def _meet_replicas(number: int, batch: str) -> bool:
    """Whether all replicas have another batch.

    Args:
        batch: description of that of this replica; "" for none.
    """
    found = session.allgather(batch, session.DP_GROUP)
    if not all(found):
        if any(found) and session.rank() == 0:
            ended = [i for i, each in enumerate(found) if not each]
            logger.warning(
                "the epoch is over for all replicas, because some have no more data:"
                " batch=%d replicas=%s",
                number,
                ended,
            )
        return False
    if number == 0 and len(set(found)) == 1 and session.rank() == 0:
        logger.warning(
            "all %d replicas train on the same batches, so that they do the same work;"
            " give each its own part of the data, as smp.shard_dataset does",
            len(found),
        )
    return True


def _described(data: Any, with_values: bool) -> str:
    tensors = tf.nest.flatten(data, expand_composites=True)
    return ", ".join(_tensor(each, with_values) for each in tensors)


def _tensor(value: Any, with_values: bool) -> str:
    if not tf.is_tensor(value):
        return repr(value)
    text = f"{value.dtype.name} {value.shape}"
    if with_values:
        text += f" crc32={_checksum(value):08x}"
    return text


def _checksum(tensor: tf.Tensor) -> int:
    array = tensor.numpy()
    if tensor.dtype == tf.string:
        return zlib.crc32(repr(array.tolist()).encode())
    return zlib.crc32(array.tobytes())


def _share_random_states() -> None:
    """Take over those of the first rank. TensorFlow has none before a seed is set: then
    one is, here; outside of smp_tf that is a random one for each process."""
    seeds = session.allgather(fitting.global_seed(), session.MP_GROUP)
    mine = int.from_bytes(os.urandom(4), "little")
    if any(seed is None for seed in seeds):
        seed = seeds[0] if seeds[0] is not None else mine
        tf.random.set_seed(session.allgather(seed, session.MP_GROUP)[0])
    state = RandomState()
    state.take_over(session.allgather(state.content(), session.MP_GROUP)[0])
