"""How many microbatches a rank may keep: one hard bound, and limits by Little's law.

A microbatch is in flight on a rank from its first forward stage there that keeps
something until all that read it are done. More of them in flight make a pipeline
faster up to a point: Little's law says that a way of T seconds, which a microbatch
leaves every t seconds, has T / t of them on it. T is the longest way from the start
of a forward stage to the end of the backward that lets go of it, messages included;
t is what the busiest rank has to do for one microbatch.

With p equal ranks in a chain that is p - i on rank i, which makes 1F1B.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Kind, Pipeline
from smp_tf.plan.schedules.progress import Progress

__all__ = [
    "Limits",
    "check_active",
    "depth_limits",
    "live_limits",
    "round_trips",
    "seconds_of_busiest",
]

_FLOAT_ERROR = 1e-9
"""So much above a whole number of microbatches is that number."""


@dataclass(frozen=True)
class Limits:
    """What forward stages may keep.

    Attributes:
        pipeline: whose stages they are.
        active: for every rank, the most microbatches in flight.
        live: for each stage, the most microbatches that are live at it; None for no
            other bound than `active`.
    """

    pipeline: Pipeline
    active: int
    live: tuple[int, ...] | None = None

    def allow(self, stage: int, progress: Progress) -> bool:
        """Whether a ready stage may start its next microbatch."""
        if not self.pipeline.holders[stage]:
            return True
        rank = self.pipeline.stages[stage].rank
        mb, oldest = progress.started[stage], progress.oldest[rank]
        newest = progress.newest[rank]
        if mb == newest and newest - oldest >= self.active:
            return False
        # The oldest may always go on, or nothing might: see `list_scheduling`.
        if mb == oldest:
            return True
        return self.live is None or progress.live[stage] < self.live[stage]


def check_active(active_microbatches: int) -> None:
    """Raise a ScheduleError if the bound lets nothing start at all."""
    if active_microbatches < 1:
        raise ScheduleError(
            "at least one microbatch must be active; "
            f"active_microbatches={active_microbatches}"
        )


def round_trips(pipeline: Pipeline) -> tuple[float, ...]:
    """For each stage, the longest way from its start to the end of its last holder.

    0 for stages that keep nothing.
    """
    stages = pipeline.stages
    seconds_to = {(m.stage, m.peer): m.seconds for m in pipeline.messages}
    found = []
    for index, holders in enumerate(pipeline.holders):
        if not holders:
            found.append(0.0)
            continue
        end = {index: stages[index].seconds}
        for later in range(index + 1, max(holders) + 1):
            starts = [
                end[need] + seconds_to.get((need, stages[later].rank), 0.0)
                for need in stages[later].needs
                if need in end
            ]
            if starts:
                end[later] = max(starts) + stages[later].seconds
        found.append(max(end[holder] for holder in holders))
    return tuple(found)


def seconds_of_busiest(pipeline: Pipeline) -> float:
    """What the busiest rank has to do for one microbatch."""
    return max(
        sum(stage.seconds for stage in pipeline.stages if stage.rank == rank)
        for rank in range(pipeline.num_ranks)
    )


def live_limits(pipeline: Pipeline, active_microbatches: int) -> tuple[int, ...]:
    """Return how many microbatches each forward stage may keep, by Little's law.

    At least 1 and at most active_microbatches; 0 for stages that keep nothing.
    """
    busiest = seconds_of_busiest(pipeline)
    found = []
    for holders, trip in zip(pipeline.holders, round_trips(pipeline)):
        limit = active_microbatches
        if trip <= busiest * active_microbatches:
            limit = math.ceil(trip / busiest - _FLOAT_ERROR) if trip else 1
        found.append(max(limit, 1) if holders else 0)
    return tuple(found)


def depth_limits(pipeline: Pipeline, active_microbatches: int) -> tuple[int, ...]:
    """Return, for each forward stage, the number of forward stages to the end.

    More microbatches could not shorten the way to the first backward. That is on the
    longest way, itself included, at most active_microbatches. Stages that no backward
    depends on (metrics, say) do not count. 0 for stages that keep nothing.
    """
    stages = pipeline.stages
    for_backward = frozenset[int]().union(
        *(
            pipeline.ancestors[index]
            for index, stage in enumerate(stages)
            if stage.kind.is_backward
        )
    )
    depth = [0] * len(stages)
    for index in reversed(range(len(stages))):
        if stages[index].kind is Kind.F and index in for_backward:
            depth[index] += 1
            for need in stages[index].needs:
                depth[need] = max(depth[need], depth[index])
    return tuple(
        min(active_microbatches, depth[index]) if pipeline.holders[index] else 0
        for index in range(len(stages))
    )
