"""Rows of a timeline's picture: what was measured, and what was predicted of it.

The prediction is stretched so that all ranks together are busy for as long as they
were: what differs then is waiting.
"""

from __future__ import annotations

from typing import NamedTuple

from smp_tf.plan.action import Action
from smp_tf.report.timeline.folder import RecordedRun


class Box(NamedTuple):
    """A call in milliseconds from the start of the step."""

    action: Action
    start: float
    end: float


class Row(NamedTuple):
    """A rank; gaps between boxes that are no waiting are other work.

    Attributes:
        waits: (start, end) in milliseconds.
        end: when the rank was done.
    """

    name: str
    remark: str
    boxes: tuple[Box, ...]
    waits: tuple[tuple[float, float], ...]
    start: float
    end: float


def measured_rows(run: RecordedRun) -> list[Row]:
    """One for each rank of the replica."""
    zero, stats = run.start_ns, run.stats

    def ms(ns: int) -> float:
        return (ns - zero) / 1e6

    return [
        Row(
            f"rank {each.rank}",
            f"{each.busy_seconds / (stats.seconds or 1.0):.0%} busy",
            tuple(Box(s.action, ms(s.start_ns), ms(s.end_ns)) for s in rank.calls),
            tuple((ms(s.start_ns), ms(s.end_ns)) for s in rank.waits),
            ms(rank.start_ns),
            ms(rank.end_ns),
        )
        for each, rank in zip(stats.ranks, run.ranks, strict=True)
    ]


def stretch(run: RecordedRun) -> float:
    """Measured over predicted busy seconds; 1 where nothing takes time."""
    predicted = run.planned.busy_seconds
    return (run.stats.busy_seconds / predicted if predicted else 0.0) or 1.0


def predicted_rows(run: RecordedRun) -> list[Row]:
    """One for each rank, stretched to the measured busy time; gaps are waiting."""
    factor = 1000 * stretch(run)
    total = run.planned.seconds
    rows = []
    for rank, calls in zip(run.group, run.planned.calls, strict=True):
        waits, last = [], 0.0
        for call in calls:
            waits.append((last * factor, call.start * factor))
            last = call.end
        waits.append((last * factor, total * factor))
        busy = sum(call.end - call.start for call in calls)
        rows.append(
            Row(
                f"rank {rank}",
                f"{busy / (total or 1.0):.0%} busy",
                tuple(Box(c.action, c.start * factor, c.end * factor) for c in calls),
                tuple(wait for wait in waits if wait[1] > wait[0]),
                0.0,
                total * factor,
            )
        )
    return rows
