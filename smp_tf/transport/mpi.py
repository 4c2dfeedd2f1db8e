"""Meeting of all ranks through MPI, where MPI has started the job.

It takes the place of the launcher's key-value store (`rendezvous`): rank 0 gathers one
byte string from everybody and sends the whole to all. Nothing listens for it. Only
point-to-point calls that can be polled are used, so that every wait has a deadline, and
only synchronous ones, so that what a rank has sent is read before the rank can end.

MPI_Finalize waits for all ranks and has no deadline. It is left to this module, which
calls it when the job has ended in order, and never after a failure: MPI's launcher then
stops what is left. A script that imports mpi4py.MPI before ``smp.init`` has chosen
otherwise, and a failure ends that job with MPI_Abort.
"""

import atexit
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from smp_tf.errors import ConfigError, TransportError
from smp_tf.transport.rendezvous import (
    POLL_SECONDS,
    STALL_SECONDS,
    missing_ranks,
    pack,
    unpack,
)

_UP, _DOWN, _FAILED = range(3)  # to rank 0, from rank 0, to everybody
_FIRST_TAG, _EPOCHS = 20_000, 4000  # MPI promises tags up to 32,767
_READ_SECONDS = 1.0  # for the others to read why this rank gives up
_GRACE_SECONDS = 2.0  # rank 0 fails this much earlier: it knows who is missing
_REASON_CHARACTERS = 2000

_T = TypeVar("_T")

logger = logging.getLogger("smp_tf")


def library(rank: int, size: int) -> Any:
    """The module mpi4py.MPI, with MPI initialised.

    Raises:
        ConfigError: mpi4py is missing or finds no MPI, or is of another MPI than the
            launcher.
    """
    loaded = "mpi4py.MPI" in sys.modules
    try:
        import mpi4py

        if not loaded:
            mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:  # RuntimeError: no libmpi
        raise ConfigError(
            f"MPI started this job, and its ranks meet through mpi4py, which cannot be "
            f"used: {error}; size={size}. `pip install mpi4py`, or launch with "
            f"`horovodrun --gloo -np {size} python script.py`."
        ) from error
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (rank, size):
        raise ConfigError(
            f"mpi4py is of another MPI than the one that started this job; rank={rank} "
            f"size={size} says the launcher, rank={world.rank} size={world.size} says "
            f"{MPI.Get_library_version().splitlines()[0]!r}. Build mpi4py against the "
            f"launcher's: `pip install --no-binary mpi4py --force-reinstall mpi4py`."
        )
    _Exit.register(MPI, ours=not loaded)
    return MPI


class _Exit:
    """What becomes of MPI when this process ends."""

    in_order: Callable[[], bool] | None = None
    registered = False

    @classmethod
    def register(cls, mpi: Any, ours: bool) -> None:
        if not cls.registered:
            cls.registered = True
            atexit.register(cls.run, mpi, ours)
            # A forked child is no rank of MPI's.
            os.register_at_fork(after_in_child=lambda: atexit.unregister(cls.run))

    @classmethod
    def run(cls, mpi: Any, ours: bool) -> None:
        if mpi.Is_finalized():
            return
        if cls.in_order is not None and cls.in_order():
            mpi.Finalize()
        elif not ours:
            sys.stdout.flush()
            sys.stderr.flush()
            mpi.COMM_WORLD.Abort(1)


def finalize_if(in_order: Callable[[], bool]) -> None:
    """At the end of this process, finalize MPI if ``in_order()`` is true then."""
    _Exit.in_order = in_order


class MpiRendezvous:
    """As ``Rendezvous``, with MPI's messages between the ranks of its world."""

    def __init__(self, *, rank: int, size: int, epoch: int, timeout_s: float) -> None:
        """
        Raises:
            ConfigError: as ``library``.
        """
        self._mpi = library(rank, size)
        self._comm = self._mpi.COMM_WORLD
        self._rank = rank
        self._size = size
        self._first_tag = _FIRST_TAG + 3 * (epoch % _EPOCHS)
        self._timeout_s = timeout_s

    def exchange(self, name: str, value: bytes) -> list[bytes]:
        """Give ``value`` to all ranks and return theirs, ordered by rank.

        Raises:
            TransportError: a rank did not come before the deadline, or gave up; the
                text names the ranks.
        """
        place = f"exchange={name}, rank={self._rank}, by MPI"
        if self._rank == 0:
            return self._gather(place, value)
        deadline = time.monotonic() + self._timeout_s + _GRACE_SECONDS
        sent = self._send(value, 0, _UP)
        found = self._wait(place, deadline, [0], lambda: self._probe(0, _DOWN))
        everything = self._receive(place, deadline, found, 0)
        self._wait(place, deadline, [0], lambda: sent.Test() or None)
        return unpack(everything)

    def _gather(self, place: str, value: bytes) -> list[bytes]:
        deadline = time.monotonic() + self._timeout_s
        values = {0: value}
        others = range(1, self._size)

        def any_of_the_missing() -> tuple[int, Any] | None:
            for peer in others:
                if peer not in values and (found := self._probe(peer, _UP)):
                    return peer, found
            return None

        while len(values) < self._size:
            missing = [peer for peer in others if peer not in values]
            peer, found = self._wait(place, deadline, missing, any_of_the_missing)
            values[peer] = self._receive(place, deadline, found, peer)
        ordered = [values[rank] for rank in range(self._size)]
        sent = {peer: self._send(pack(ordered), peer, _DOWN) for peer in others}
        for peer, request in sent.items():
            self._wait(place, deadline, [peer], lambda: request.Test() or None)
        return ordered

    def give_up(self, reason: str) -> str | None:
        """Tell the other ranks why this one will not come; never raises.

        Returns:
            What another rank has told before, from which this failure follows; None if
            this one was the first.
        """
        first = self._news()
        if first is not None:
            return first
        text = f"rank {self._rank} failed: {reason}".encode()[:_REASON_CHARACTERS]
        others = [peer for peer in range(self._size) if peer != self._rank]
        sent = [self._send(text, peer, _FAILED) for peer in others]
        deadline = time.monotonic() + _READ_SECONDS
        while not all(request.Test() for request in sent):
            if time.monotonic() > deadline:
                break
            time.sleep(POLL_SECONDS[0])
        return None

    def _wait(
        self,
        place: str,
        deadline: float,
        awaited: Sequence[int],
        poll: Callable[[], _T | None],
    ) -> _T:
        """Poll until there is something; TransportError names the awaited ranks."""
        pause, longest = POLL_SECONDS
        stall = time.monotonic() + STALL_SECONDS
        while (found := poll()) is None:
            failed = self._news()
            if failed is not None:
                raise TransportError(f"{failed} ({place})")
            now = time.monotonic()
            if now > deadline:
                raise TransportError(
                    f"{missing_ranks(awaited, self._size)} not within "
                    f"timeout_s={self._timeout_s:g} ({place}). Look at the output of "
                    f"the missing ranks; if they only start slowly, raise timeout_s."
                )
            if now > stall:
                stall = math.inf
                whom = missing_ranks(awaited, self._size)
                logger.warning("rank %d still waits: %s (%s)", self._rank, whom, place)
            time.sleep(pause)
            pause = min(2 * pause, longest)
        return found

    def _send(self, value: bytes, peer: int, kind: int) -> Any:
        buffer = [value, self._mpi.BYTE]
        return self._comm.Issend(buffer, peer, self._first_tag + kind)

    def _probe(self, source: int, kind: int) -> tuple[Any, int] | None:
        """A message that has come, and its length in bytes."""
        status = self._mpi.Status()
        message = self._comm.Improbe(source, self._first_tag + kind, status)
        if message is None:
            return None
        return message, status.Get_count(self._mpi.BYTE)

    def _receive(
        self, place: str, deadline: float, found: tuple[Any, int], peer: int
    ) -> bytes:
        message, length = found
        memory = bytearray(length)
        request = message.Irecv([memory, self._mpi.BYTE])
        self._wait(place, deadline, [peer], lambda: request.Test() or None)
        return bytes(memory)

    def _news(self) -> str | None:
        """Why a rank has given up, if one has."""
        found = self._probe(self._mpi.ANY_SOURCE, _FAILED)
        if found is None:
            return None
        message, length = found
        memory = bytearray(length)
        message.Recv([memory, self._mpi.BYTE])
        return memory.decode(errors="replace")
