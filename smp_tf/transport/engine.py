"""The C API of the kernel library as a Python object.

One place declares the C signatures and turns ``-1`` plus ``smp_last_error()`` into
``TransportError``. ctypes releases the GIL during every call; whoever waits does so in
short slices (``wait``), or signals would never reach Python.
"""

import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from smp_tf.errors import TransportError

Memory = npt.NDArray[np.uint8]
"""Contiguous bytes that a request reads or writes; must live until the request ends."""

_ADDRESS_BYTES = 64 * 1024  # far more than a UCX worker address takes
_TEXT_BYTES = 4096
_NCCL_ID_BYTES = 128

_INT, _SECONDS, _TEXT = ctypes.c_int, ctypes.c_double, ctypes.c_char_p
_CHANNEL, _REQUEST = ctypes.c_uint32, ctypes.c_int64
_POINTER, _LENGTH = ctypes.c_void_p, ctypes.c_size_t

_SIGNATURES: dict[str, tuple[Any, ...]] = {  # name -> result, arguments
    "smp_last_error": (_TEXT,),
    "smp_open": (_INT, _INT, _INT, _SECONDS, _TEXT, _TEXT, _POINTER, _LENGTH),
    "smp_connect": (_INT, _INT, _POINTER, _LENGTH),
    "smp_start": (_INT,),
    "smp_post_send": (_REQUEST, _INT, _CHANNEL, _POINTER, _LENGTH, _INT),
    "smp_post_recv": (_REQUEST, _INT, _CHANNEL, _POINTER, _LENGTH),
    "smp_wait": (_INT, _REQUEST, _SECONDS),
    "smp_cancel": (_INT, _REQUEST),
    "smp_abort": (_INT, _TEXT),
    "smp_failure": (_INT, _POINTER, _LENGTH),
    "smp_close": (_INT, _SECONDS),
    "smp_describe": (_INT, _INT, _POINTER, _LENGTH),
    "smp_gpu_open": (_INT, _INT),
    "smp_nccl_id": (_INT, _POINTER, _LENGTH),
    "smp_nccl_connect": (_INT, _INT, _INT, _TEXT, _LENGTH),
    "smp_nccl_group": (_INT, _POINTER, _INT, _TEXT, _LENGTH),
}


class Engine:
    """This process's connections; every method may raise TransportError."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._calls: dict[str, Callable[..., Any]] = {}
        for name, (result, *arguments) in _SIGNATURES.items():
            function = getattr(library, name)
            function.restype, function.argtypes = result, arguments
            self._calls[name] = function

    def open(
        self,
        *,
        rank: int,
        size: int,
        timeout_s: float,
        job_id: str,
        net_devices: str | None,
    ) -> bytes:
        """Open this rank's end; return the address that its peers connect to."""
        address = np.empty(_ADDRESS_BYTES, np.uint8)
        length = self._call(
            "smp_open",
            rank,
            size,
            timeout_s,
            job_id.encode(),
            net_devices.encode() if net_devices else None,
            address.ctypes.data,
            address.size,
        )
        return address[:length].tobytes()

    def connect(self, peer: int, address: bytes) -> None:
        """Make known where ``peer`` is; all peers before ``start``."""
        self._call("smp_connect", peer, address, len(address))

    def start(self) -> None:
        """Start progress and the watch over the peers."""
        self._call("smp_start")

    def post_send(
        self, peer: int, channel: int, memory: Memory, *, synchronous: bool
    ) -> int:
        """Queue bytes for ``peer``; the number of the request.

        The request is done when ``memory`` may be used again, and with ``synchronous``
        not before the peer has made the matching receive.
        """
        return self._call(
            "smp_post_send",
            peer,
            channel,
            memory.ctypes.data,
            memory.size,
            int(synchronous),
        )

    def post_recv(self, peer: int, channel: int, memory: Memory) -> int:
        """Ask for exactly ``memory.size`` bytes from ``peer``; the request's number."""
        return self._call(
            "smp_post_recv", peer, channel, memory.ctypes.data, memory.size
        )

    def wait(self, request: int, seconds: float) -> bool:
        """Wait at most ``seconds``; True if the request is done (and forgotten)."""
        return self._call("smp_wait", request, seconds) == 0

    def cancel(self, request: int) -> None:
        """End a request that is still waiting; its memory is free when this returns."""
        self._calls["smp_cancel"](request)

    def abort(self, reason: str) -> None:
        """Tell all peers why this rank gives up. At most a second; never raises."""
        self._calls["smp_abort"](reason.encode())

    def failure(self) -> str | None:
        """What this rank knows of the first failed peer ("rank 1 died"), or None."""
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        if self._calls["smp_failure"](text, len(text)) <= 0:
            return None
        return text.value.decode(errors="replace")

    def close(self, seconds: float) -> None:
        """Leave: wait at most ``seconds`` for the live peers to leave too, then close.

        A slower peer may still have to receive what this rank sent.
        """
        self._call("smp_close", seconds)

    def describe(self, peer: int) -> str:
        """Which UCX transports carry the messages to ``peer``."""
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        self._call("smp_describe", peer, text, len(text))
        return text.value.decode(errors="replace")

    def open_gpu(self, ordinal: int) -> None:
        """Let tensors in the memory of a GPU, the ``ordinal``-th visible one, travel.

        Once, after ``start``.
        """
        self._call("smp_gpu_open", ordinal)

    def nccl_id(self) -> bytes:
        """What both ends of a new connection between two GPUs need."""
        made = np.empty(_NCCL_ID_BYTES, np.uint8)
        length = self._call("smp_nccl_id", made.ctypes.data, made.nbytes)
        return made[:length].tobytes()

    def connect_gpu(self, peer: int, sends: bool, nccl_id: bytes) -> None:
        """Connect with the GPU of ``peer``, to send to it or to receive from it.

        Returns when both ranks are there, within timeout_s. Ranks that make several
        connections must make them in an order that all of them agree on.
        """
        self._call("smp_nccl_connect", peer, int(sends), nccl_id, len(nccl_id))

    def connect_group(self, ranks: Sequence[int], nccl_id: bytes) -> int:
        """Connect the GPUs of a group, this rank's among them, for sums.

        As ``connect_gpu``. Returns the number that ``ops.sum_post`` takes.
        """
        numbers = np.array(ranks, np.int32)
        memory = numbers.ctypes.data
        return self._call(
            "smp_nccl_group", memory, len(numbers), nccl_id, len(nccl_id)
        )

    def _call(self, name: str, *arguments: Any) -> int:
        result: int = self._calls[name](*arguments)
        if result < 0:
            text = self._calls["smp_last_error"]() or b"no reason given"
            raise TransportError(text.decode(errors="replace"))
        return result
