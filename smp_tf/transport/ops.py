"""The kernel library: found, checked and loaded once; its ops as typed functions.

The library holds the point-to-point ops for TensorFlow and a C API for everything
else; both work on the same connections. Inside a graph a tensor travels in four parts,
so that neither end waits longer than it must:

    rank 0:  send_post  ...  next segment  ...  send_flush
    rank 1:  recv_post  ...  other segment ...  recv_wait -> tensor

The n-th send of a channel meets its n-th receive. ``peer`` is a world rank, ``channel``
a number below 2**28 that both ends derive alike, ``shape`` what both ends know of the
shape (fully defined: the data travels alone; otherwise the true shape goes ahead of
it), and ``label`` the tensor's name in errors. ``more`` says that the next operation
sends to, or receives from, the same rank. On a GPU the tensors travel by NCCL, those
that follow each other together, and ``recv_wait`` lets the device wait rather than the
program; ``send_flush`` then waits for what was received as well. At run time the ops
fail with ``UnavailableError`` (a rank died, failed or left),
``DeadlineExceededError`` (nothing came within ``timeout_s`` of the wait),
``DataLossError`` (the ends disagree about size, type or shape), ``CancelledError`` and
``FailedPreconditionError`` (no job is open).

The timeline (``events``) records an op between ``run_begin`` and ``run_end`` of its
``program`` as number ``event``, unless that is negative.
"""

import ctypes
import mmap
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import tensorflow as tf

from smp_tf.errors import TransportError

_REMEDY = "run `make setup` or `pip install --no-build-isolation .`"


class _Library(NamedTuple):
    ops: Any  # module of the raw ops
    c_api: ctypes.CDLL


def library_path() -> Path:
    """Where the kernel library is, or would be."""
    return Path(__file__).with_name("_smp_kernels.so")


def built_for(path: Path) -> str:
    """TensorFlow version that the library at ``path`` was built for; "" if unknown.

    Read from the file: loading a library that was built for another version may crash.
    """
    with path.open("rb") as file:
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            found = re.search(rb"smp_tf kernels: tensorflow=([^ ;]+)", content)
            return found.group(1).decode() if found else ""


def load() -> ctypes.CDLL:
    """Load the kernel library, once per process; the handle of its C API.

    Raises:
        TransportError: it is missing, was built for another TensorFlow, or does not
            load; the text says how to build it.
    """
    return _load().c_api


@lru_cache(maxsize=None)
def _load() -> _Library:
    path = library_path()
    if not path.exists() or path.stat().st_size == 0:
        raise TransportError(f"the kernels are not built; path={path}; {_REMEDY}")
    version = built_for(path)
    if version != tf.__version__:
        raise TransportError(
            f"the kernels were built for another TensorFlow; built_for={version!r} "
            f"installed={tf.__version__!r} path={path}; {_REMEDY}"
        )
    try:
        return _Library(tf.load_op_library(str(path)), ctypes.CDLL(str(path)))
    except (OSError, tf.errors.OpError) as error:
        reason = str(error).splitlines()[0]
        raise TransportError(
            f"the kernels do not load: {reason}; path={path}; {_REMEDY}"
        ) from error


CALL = "SmpCall"
"""Type of the operation that calls a function by name; see kernels/call_ops.cc."""


def run_begin(program: int) -> tf.Operation:
    """Begin a run of a program: what the timeline records belongs to it."""
    return _load().ops.smp_run_begin(program=program)


def run_end(program: int, functions: Sequence[str]) -> tf.Operation:
    """End the run of a program, and name the functions that the graph calls by name."""
    return _load().ops.smp_run_end(program=program, functions=list(functions))


def send_post(
    tensor: tf.Tensor,
    *,
    peer: int,
    channel: int,
    shape: tf.TensorShape,
    label: str,
    more: bool = False,
    program: int = -1,
    event: int = -1,
) -> tf.Operation:
    """Queue ``tensor`` for rank ``peer`` without waiting for its receive.

    Raises:
        tf.errors.InvalidArgumentError: at run time, the tensor does not have ``shape``;
            or its type is neither plain bytes nor strings (resources, variants).
    """
    return _load().ops.smp_send_post(
        tensor,
        peer=peer,
        channel=channel,
        shape=shape,
        label=label,
        more=more,
        program=program,
        event=event,
    )


def send_flush() -> tf.Operation:
    """Wait until all tensors queued so far by this process have left."""
    return _load().ops.smp_send_flush()


def recv_post(
    dtype: tf.DType,
    shape: tf.TensorShape,
    *,
    peer: int,
    channel: int,
    label: str,
    more: bool = False,
    program: int = -1,
    event: int = -1,
) -> tf.Operation:
    """Make room for a tensor from rank ``peer``, for a later ``recv_wait``."""
    return _load().ops.smp_recv_post(
        T=dtype,
        peer=peer,
        channel=channel,
        shape=shape,
        label=label,
        more=more,
        program=program,
        event=event,
    )


def recv_wait(
    dtype: tf.DType,
    shape: tf.TensorShape,
    *,
    peer: int,
    channel: int,
    label: str,
    more: bool = False,
    program: int = -1,
    event: int = -1,
) -> tf.Tensor:
    """Give the next tensor of the channel, of type ``dtype`` and static ``shape``.

    Takes the oldest ``recv_post`` of the channel, or posts the receive itself.
    """
    return _load().ops.smp_recv_wait(
        T=dtype,
        peer=peer,
        channel=channel,
        shape=shape,
        label=label,
        more=more,
        program=program,
        event=event,
    )


def sum_post(tensor: tf.Tensor, *, group: int, label: str) -> Any:
    """Begin to add up ``tensor`` over the GPUs of a group; for ``sum_wait``.

    Every rank of the group must begin its sums in the same order.

    Args:
        group: of ``Engine.connect_group``.
        label: what errors call the sum.

    Returns:
        (sum, handle); the operation that has begun it is ``sum.op``.
    """
    return _load().ops.smp_sum_post(tensor, group=group, label=label)


def sum_wait(total: tf.Tensor, handle: tf.Tensor) -> tf.Tensor:
    """The sum, once it is there; what does not read it goes on meanwhile."""
    return _load().ops.smp_sum_wait(total, handle)
