"""Requests of one call, waited for in slices, with what they use kept alive.

The engine itself warns of a wait that takes long.
"""

import dataclasses
import time
from collections.abc import Callable
from types import TracebackType

from smp_tf.errors import TransportError
from smp_tf.transport.engine import Engine, Memory

_SLICE_SECONDS = 0.1  # a wait looks at signals and at the deadline this often


@dataclasses.dataclass(eq=False, slots=True)
class Request:
    """One send or receive; ``memory`` is what it reads or fills."""

    number: int
    peer: int
    memory: Memory
    done: bool = False


class Requests:
    """The sends and receives of one call; ends them all on the way out.

    Leaving the block with an exception (also Ctrl-C) cancels what is unfinished and
    calls ``on_break`` with the reason, because the peers' counts no longer match.
    """

    def __init__(
        self,
        engine: Engine,
        call: str,
        timeout_s: float,
        on_break: Callable[[str], None],
    ) -> None:
        self._engine = engine
        self._call = call
        self._timeout_s = timeout_s
        self._on_break = on_break
        self._all: list[Request] = []
        self._deadline = time.monotonic() + timeout_s

    def __enter__(self) -> "Requests":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            return
        self._on_break(f"{type(error).__name__}: {error}")
        for request in self._all:
            if not request.done:
                self._engine.cancel(request.number)

    def send(
        self, peer: int, channel: int, memory: Memory, *, synchronous: bool
    ) -> Request:
        """Queue ``memory`` for ``peer``; see ``Engine.post_send``."""
        number = self._engine.post_send(
            peer, channel, memory, synchronous=synchronous
        )
        return self._keep(Request(number, peer, memory))

    def receive(self, peer: int, channel: int, memory: Memory) -> Request:
        """Ask ``peer`` for exactly as many bytes as ``memory`` holds."""
        number = self._engine.post_recv(peer, channel, memory)
        return self._keep(Request(number, peer, memory))

    def wait(self, request: Request) -> Memory:
        """Wait until one request is done; its memory.

        Raises:
            TransportError: its peer failed, or timeout_s is over since the call began.
        """
        while not request.done:
            left = self._deadline - time.monotonic()
            if not self._ended(request, min(max(left, 0.0), _SLICE_SECONDS)):
                self._look_at_clock()
        return request.memory

    def wait_all(self) -> None:
        """Wait until every request is done; raises as ``wait``."""
        for request in self._all:
            self.wait(request)

    def _keep(self, request: Request) -> Request:
        self._all.append(request)
        return request

    def _ended(self, request: Request, seconds: float) -> bool:
        """Whether a request ends within ``seconds``; raises when it failed."""
        try:
            request.done = self._engine.wait(request.number, seconds)
        except TransportError as error:
            request.done = True
            raise TransportError(f"{error} ({self._call})") from None
        return request.done

    def _look_at_clock(self) -> None:
        if time.monotonic() > self._deadline:
            raise TransportError(
                f"{self._absent()} did not answer within timeout_s="
                f"{self._timeout_s:g} ({self._call}). Look at what those ranks do; if "
                f"they only need longer, raise timeout_s."
            )

    def _absent(self) -> str:
        peers = {
            request.peer
            for request in self._all
            if not (request.done or self._ended(request, 0.0))
        }
        numbers = ", ".join(map(str, sorted(peers)))
        return f"rank {numbers}" if len(peers) == 1 else f"ranks {numbers}"
