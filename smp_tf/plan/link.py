"""How long a message takes from one rank to another: a latency and a bandwidth.

What is measured with a profile holds; other links count as those of one host.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class Link:
    """The usual model of a link, by Hockney: t(n) = latency + n / bandwidth.

    Attributes:
        latency_seconds: from the end of a tensor on one rank to its start on the other.
        bytes_per_second: of a long message.
    """

    latency_seconds: float
    bytes_per_second: float

    def seconds(self, num_bytes: int) -> float:
        """Of one message."""
        return self.latency_seconds + num_bytes / self.bytes_per_second


Links: TypeAlias = Mapping[tuple[int, int], Link]
"""(pp_rank that sends, pp_rank that receives) -> what was measured."""

SAME_HOST = Link(latency_seconds=1.5e-4, bytes_per_second=3e9)
"""Two processes of a host, from benchmarks/send_recv.py and a receiver that has to wake
up."""


def link_between(links: Links, source: int, peer: int) -> Link:
    """The link of a pair of ranks."""
    return links.get((source, peer), SAME_HOST)


def rounds_of_pairs(count: int) -> Sequence[Sequence[tuple[int, int]]]:
    """Every pair of ``count`` ranks once, in rounds in which no rank has two peers.

    The circle method of tournaments: the last one stays, the others go round.
    """
    even = count + count % 2
    rounds = []
    for turn in range(even - 1):
        pairs = [(turn, even - 1)]
        pairs += [
            ((turn + i) % (even - 1), (turn - i) % (even - 1))
            for i in range(1, even // 2)
        ]
        rounds.append(
            [(min(pair), max(pair)) for pair in pairs if max(pair) < count]
        )
    return rounds
