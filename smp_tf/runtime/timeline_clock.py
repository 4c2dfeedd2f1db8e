"""One clock for all ranks: what the clock of rank 0 shows more than this rank's.

Ranks that booted together read the same clock, and are off by exactly nothing. Any
other rank asks rank 0 a few times for the time:

    this rank    sent ------------------------------> received
                      \\                            /
    rank 0             -> received_there ... sent_there

No message arrives before it is sent. So every exchange bounds the offset from both
sides, and all of them together bound it best:

    max(sent_there - received) <= offset <= min(received_there - sent)
"""

import contextlib
import dataclasses
import os
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from smp_tf.transport.messages import Messages, RankType

EXCHANGES = 10
"""Each is a fraction of a millisecond; the fastest one in each direction counts."""


class Exchange(NamedTuple):
    """A question and its answer; nanoseconds, each on the clock of where it was."""

    sent: int
    received_there: int
    sent_there: int
    received: int


@dataclasses.dataclass(frozen=True)
class Clock:
    """Attributes:
    offset_ns: time of rank 0 minus time of this rank.
    error_ns: by how much that may be wrong.
    """

    offset_ns: int = 0
    error_ns: int = 0


def clock_name() -> str:
    """The same for processes that read the same monotonic clock, and only for them."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    with contextlib.suppress(OSError):  # containers may shift it for themselves
        boot += f" {os.readlink('/proc/self/ns/time')}"
    return boot


def offset_of(exchanges: Iterable[Exchange]) -> Clock:
    """The middle of what all exchanges allow."""
    each = list(exchanges)
    low = max(exchange.sent_there - exchange.received for exchange in each)
    high = min(exchange.received_there - exchange.sent for exchange in each)
    # low > high: the clocks drifted apart meanwhile, by that little.
    return Clock((low + high) // 2, (abs(high - low) + 1) // 2)


def align(
    messages: Messages,
    rank: int,
    clocks: Sequence[str],
    now: Callable[[], int] = time.monotonic_ns,
) -> Clock:
    """Find the offset of this rank; every rank must call it.

    Args:
        clocks: name of the clock of each rank.

    Raises:
        TransportError: a rank failed, or did not call it within timeout_s.
    """
    others = [r for r, clock in enumerate(clocks) if clock != clocks[0]]
    if rank == 0:
        for peer in others:
            for _ in range(EXCHANGES):
                messages.recv_from(peer, RankType.WORLD_RANK)
                received = now()
                messages.send((received, now()), peer, RankType.WORLD_RANK)
        return Clock()
    if rank not in others:
        return Clock()
    exchanges = []
    for _ in range(EXCHANGES):
        sent = now()
        messages.send(None, 0, RankType.WORLD_RANK)
        there = messages.recv_from(0, RankType.WORLD_RANK)
        exchanges.append(Exchange(sent, there[0], there[1], now()))
    return offset_of(exchanges)
