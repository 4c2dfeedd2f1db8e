"""Objects as parts of bytes, and back.

An object is pickled with protocol 5; the data of numpy arrays and tensors stays where
it is and becomes parts of its own:

    packet   always 1 KB: job id, operation, sizes, and the body where it fits
    body     length of each buffer, pickle           (only when it does not fit)
    buffers  one part each

The receiver knows the size of the first part, which tells the sizes of the rest.
Nothing is unpickled before the packet has shown the id of this job.
"""

import enum
import io
import pickle
import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from smp_tf.errors import TransportError
from smp_tf.transport.engine import Memory

PACKET_BYTES = 1024

_HEADER = struct.Struct("<16sIIQ")  # job, operation, number of buffers, body bytes
_IN_BAND_BYTES = 4096  # smaller buffers are cheaper inside the pickle than alone


class Operation(enum.IntEnum):
    """What the sender was doing; the receiver must be doing the same."""

    OBJECT = 1
    ALLGATHER = 2
    BARRIER = 3


class Packet(NamedTuple):
    """A first part, read: ``body`` is None when it comes as a part of its own."""

    num_buffers: int
    body_bytes: int
    body: Memory | None


def encode(obj: Any, operation: Operation, job_id: str) -> list[Memory]:
    """Parts of the message for ``obj``; they share the memory of its arrays.

    Raises:
        pickle.PicklingError, TypeError, AttributeError: ``obj`` cannot be pickled.
    """
    buffers: list[Memory] = []

    def take(buffer: pickle.PickleBuffer) -> bool:
        raw = buffer.raw()
        if raw.nbytes < _IN_BAND_BYTES:
            return True  # leave it in the pickle
        buffers.append(np.frombuffer(raw, np.uint8))
        return False

    stream = io.BytesIO()
    _Pickler(stream, protocol=5, buffer_callback=take).dump(obj)
    lengths = struct.pack(f"<{len(buffers)}Q", *(buffer.size for buffer in buffers))
    body = np.frombuffer(lengths + stream.getbuffer(), np.uint8)
    packet = np.zeros(PACKET_BYTES, np.uint8)
    header = _HEADER.pack(bytes.fromhex(job_id), operation, len(buffers), body.size)
    packet[: _HEADER.size] = np.frombuffer(header, np.uint8)
    if _HEADER.size + body.size <= PACKET_BYTES:
        packet[_HEADER.size : _HEADER.size + body.size] = body
        return [packet, *buffers]
    return [packet, body, *buffers]


def read_packet(packet: Memory, operation: Operation, job_id: str) -> Packet:
    """Check and take apart a first part.

    Raises:
        TransportError: it is not of this job, or the sender does something else.
    """
    job, sent, num_buffers, body_bytes = _HEADER.unpack_from(packet.data)
    if job != bytes.fromhex(job_id):
        raise TransportError(
            "refused a message that does not carry the id of this job; "
            f"id={job.hex()[:8]}.., operation={sent}"
        )
    if sent != operation:
        raise TransportError(
            "the ranks do not make the same calls in the same order: "
            f"{_name(sent)} arrived where {_name(operation)} was called"
        )
    body = packet[_HEADER.size : _HEADER.size + body_bytes]
    return Packet(num_buffers, body_bytes, body if body.size == body_bytes else None)


def buffer_lengths(body: Memory, num_buffers: int) -> tuple[int, ...]:
    """Bytes of each buffer that follows the body."""
    return struct.unpack_from(f"<{num_buffers}Q", body.data)


def decode(body: Memory, buffers: Sequence[Memory]) -> Any:
    """The object; its arrays use the memory of ``buffers``."""
    return pickle.loads(body.data[8 * len(buffers) :], buffers=buffers)


class _Pickler(pickle.Pickler):
    """Takes out the data of the arrays that numpy would pickle by value.

    These are arrays of dtypes that numpy does not define itself (bfloat16), of dates,
    and arrays that are not contiguous. A tensor pickles as the array of its data.
    """

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not np.ndarray or obj.dtype.hasobject or not obj.size:
            return NotImplemented
        whole = obj.flags.c_contiguous or obj.flags.f_contiguous
        foreign = obj.dtype.isbuiltin == 2  # defined by another package
        if whole and not foreign and obj.dtype.kind not in "mM":
            return NotImplemented  # numpy takes the data out itself
        data = np.ascontiguousarray(obj)
        buffer = pickle.PickleBuffer(data.reshape(-1).view(np.uint8).data)
        return _restore, (buffer, obj.dtype, obj.shape)


def _restore(
    buffer: Any, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> np.ndarray[Any, Any]:
    return np.frombuffer(buffer, np.uint8).view(dtype).reshape(shape)


def _name(operation: int) -> str:
    return {1: "send or broadcast", 2: "allgather", 3: "barrier"}.get(
        operation, f"operation {operation}"
    )
