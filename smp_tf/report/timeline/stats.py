"""Figures of one run of a step: who computed, who waited for whom, what was sent."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from smp_tf.report.columns import aligned, mib
from smp_tf.report.markup import timed
from smp_tf.report.timeline.run import RankRun, Span


@dataclasses.dataclass(frozen=True)
class RankStats:
    """What one rank did in one run.

    Attributes:
        rank: in the job.
        pp_rank: the partition that it holds.
        seconds: from the moment this rank began the step to the one it was done.
        busy_seconds: in its segments, forward and backward.
        waiting_seconds: world rank -> how long this rank stood still for a tensor of
            that rank.
        bytes_sent: of tensors, to other ranks.
        peak_bytes_in_flight: most bytes that were posted and had not left, at once.
    """

    rank: int
    pp_rank: int
    seconds: float
    busy_seconds: float
    waiting_seconds: Mapping[int, float]
    bytes_sent: int
    peak_bytes_in_flight: int

    @property
    def busy_share(self) -> float:
        """Of its own step time."""
        return self.busy_seconds / self.seconds if self.seconds else 0.0

    @property
    def waited_seconds(self) -> float:
        """For all ranks together."""
        return sum(self.waiting_seconds.values())

    @property
    def other_seconds(self) -> float:
        """Neither: arguments, sums of gradients, the calls themselves, the end."""
        return self.seconds - self.busy_seconds - self.waited_seconds


@dataclasses.dataclass(frozen=True)
class StepStats:
    """What ``smp.last_step_stats()`` returns; ``print`` shows it as a table.

    Attributes:
        name: of the step.
        run: counts the runs of all steps of the process, from 1.
        ranks: those of the mp_group, by pp_rank.
        predicted_bubble: what the plan of the step says.
    """

    name: str
    run: int
    ranks: tuple[RankStats, ...]
    predicted_bubble: float

    @property
    def seconds(self) -> float:
        """Step time: that of the rank which took longest."""
        return max((each.seconds for each in self.ranks), default=0.0)

    @property
    def busy_seconds(self) -> float:
        """Of all ranks together."""
        return sum(each.busy_seconds for each in self.ranks)

    @property
    def busy_share(self) -> float:
        """Of the time of all ranks; the rest is the bubble."""
        total = len(self.ranks) * self.seconds
        return self.busy_seconds / total if total else 0.0

    @property
    def bubble(self) -> float:
        """Share of rank time that is not spent in segments, 1 - busy / (ranks * step
        time): as in the plan, but what is neither computing nor waiting is in it."""
        return max(1.0 - self.busy_share, 0.0)

    @property
    def bytes_sent(self) -> int:
        """By all ranks."""
        return sum(each.bytes_sent for each in self.ranks)

    @property
    def peak_bytes_in_flight(self) -> int:
        """Of the rank that had most."""
        return max((each.peak_bytes_in_flight for each in self.ranks), default=0)

    def __str__(self) -> str:
        title = (
            f"step={self.name} run={self.run}: {timed(self.seconds)},"
            f" bubble {self.bubble:.1%} (predicted {self.predicted_bubble:.1%})"
        )
        return "\n".join([title, *aligned([HEADER, *rows_of(self)], left=(5,))])


HEADER = (
    "rank",
    "partition",
    "step",
    "busy",
    "waited",
    "for",
    "other",
    "sent, MiB",
    "in flight, MiB",
)


def rows_of(stats: StepStats) -> list[tuple[str, ...]]:
    """Cells under HEADER, one row for each rank."""
    return [
        (
            str(each.rank),
            str(each.pp_rank),
            timed(each.seconds),
            f"{each.busy_share:.1%}",
            _share(each.waited_seconds, each.seconds),
            _for_whom(each.waiting_seconds),
            _share(each.other_seconds, each.seconds),
            mib(each.bytes_sent),
            mib(each.peak_bytes_in_flight),
        )
        for each in stats.ranks
    ]


def rank_stats(run: RankRun, group: Sequence[int], pp_rank: int) -> RankStats:
    """Figures of one rank.

    Args:
        group: pp_rank -> world rank.
    """
    waiting: dict[int, float] = {}
    for span in run.waits:
        assert span.action.peer is not None  # a message's always has one
        peer = group[span.action.peer]
        waiting[peer] = waiting.get(peer, 0.0) + span.seconds
    return RankStats(
        rank=group[pp_rank],
        pp_rank=pp_rank,
        seconds=run.seconds,
        busy_seconds=sum(span.seconds for span in run.calls),
        waiting_seconds=dict(sorted(waiting.items())),
        bytes_sent=sum(span.bytes for span in run.sends),
        peak_bytes_in_flight=max((n for _, n in in_flight(run.sends)), default=0),
    )


def in_flight(sends: Iterable[Span]) -> list[tuple[int, int]]:
    """(time, bytes in flight from then on), at each change."""
    changes: dict[int, int] = {}
    for span in sends:
        changes[span.start_ns] = changes.get(span.start_ns, 0) + span.bytes
        changes[span.end_ns] = changes.get(span.end_ns, 0) - span.bytes
    found, level = [], 0
    for time, change in sorted(changes.items()):
        level += change
        found.append((time, level))
    return found


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"


def _for_whom(waiting: Mapping[int, float]) -> str:
    """``0: 1.2 ms, 2: 30 µs``."""
    told = (f"{rank}: {timed(seconds)}" for rank, seconds in waiting.items())
    return ", ".join(told) or "-"
