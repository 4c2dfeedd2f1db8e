"""The one core of all schedules: list scheduling on a simulated clock.

Ranks run their stages for `Stage.seconds`. Whenever a rank is free it takes, of
the actions whose needs are done, the one that the policy prefers among those that
the policy allows; if there is none, it waits. The order that comes out needs no
clock any more: it is the schedule.

Messages take no time here. They would shift every start by about the same amount
and the order is what counts.

Why no policy of this package can deadlock: a stage takes its microbatches in
ascending order, so what is live on a rank is never older than the oldest
unfinished microbatch. The first unfinished stage of that microbatch therefore
finds no older microbatch to wait for, and every limit is at least one.
"""

from __future__ import annotations

import heapq
from typing import Protocol

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Action, Pipeline, Schedule

__all__ = ["Policy", "Progress", "list_schedule"]


class Progress:
    """How far every stage is, counted in microbatches.

    Microbatches of a stage run in ascending order, one after the other, so a
    count says which ones: `done[s] == 3` means 0, 1 and 2.
    """

    def __init__(self, pipeline: Pipeline, num_microbatches: int) -> None:
        self.pipeline = pipeline
        self.num_microbatches = num_microbatches
        self.started = [0] * len(pipeline.stages)
        self.done = [0] * len(pipeline.stages)
        self.by_rank: list[list[int]] = [[] for _ in range(pipeline.num_ranks)]
        for index, stage in enumerate(pipeline.stages):
            self.by_rank[stage.rank].append(index)

    def is_ready(self, stage: int) -> bool:
        """Whether the next microbatch of this stage has all it needs."""
        mb, given = self.started[stage], self.pipeline.stages[stage]
        return (
            mb < self.num_microbatches
            and all(self.done[need] > mb for need in given.needs)
            and all(self.done[other] >= mb for other in given.after)
        )

    def live(self, stage: int) -> int:
        """Microbatches whose activations this forward stage keeps."""
        holders = self.pipeline.holders[stage]
        if not holders:
            return 0
        return self.started[stage] - min(self.done[holder] for holder in holders)

    def in_flight(self, rank: int) -> range:
        """Microbatches live at any forward stage of this rank."""
        keeping = [s for s in self.by_rank[rank] if self.pipeline.holders[s]]
        if not keeping:
            return range(0)
        return range(
            min(self.done[h] for s in keeping for h in self.pipeline.holders[s]),
            max(self.started[stage] for stage in keeping),
        )


class Policy(Protocol):
    """What tells one schedule from another."""

    def priority(self, stage: int, mb: int) -> tuple[int, ...]:
        """Rank the actions that could start now: the smallest goes first."""

    def may_start(self, stage: int, progress: Progress) -> bool:
        """Whether the next microbatch of a ready stage may start now."""


def list_schedule(
    pipeline: Pipeline, num_microbatches: int, policy: Policy
) -> Schedule:
    """Order all compute actions of a pipeline under a policy.

    Args:
        pipeline: stages with their seconds per microbatch.
        num_microbatches: how often every stage runs; also fewer than ranks.
        policy: preferences and limits.

    Returns:
        Compute actions only; `comm.add_messages` adds the messages.

    Raises:
        ScheduleError: num_microbatches is below 1, or the policy forbids
            everything that is left.
    """
    if num_microbatches < 1:
        raise ScheduleError(
            "a schedule has at least one microbatch; "
            f"num_microbatches={num_microbatches}"
        )
    progress = Progress(pipeline, num_microbatches)
    order: list[list[Action]] = [[] for _ in range(pipeline.num_ranks)]
    free = set(range(pipeline.num_ranks))
    running: list[tuple[float, int]] = []  # (time of end, stage), a heap
    now = 0.0
    while True:
        for rank in sorted(free):
            stage = _choose(rank, progress, policy)
            if stage is None:
                continue
            mb = progress.started[stage]
            progress.started[stage] += 1
            order[rank].append(Action(pipeline.stages[stage].kind, stage, mb))
            heapq.heappush(running, (now + pipeline.stages[stage].seconds, stage))
            free.remove(rank)
        if not running:
            break
        # All ends of one instant count before anyone chooses, or the choice of
        # one rank would depend on the number of another.
        now = running[0][0]
        while running and running[0][0] == now:
            _, stage = heapq.heappop(running)
            progress.done[stage] += 1
            free.add(pipeline.stages[stage].rank)
    stuck = [s for s, done in enumerate(progress.done) if done < num_microbatches]
    if stuck:
        raise ScheduleError(
            f"the policy lets nothing start any more; policy={policy}, "
            f"stages={stuck}, num_microbatches={num_microbatches}"
        )
    return Schedule(tuple(map(tuple, order)))


def _choose(rank: int, progress: Progress, policy: Policy) -> int | None:
    candidates = (
        stage
        for stage in progress.by_rank[rank]
        if progress.is_ready(stage) and policy.may_start(stage, progress)
    )
    return min(
        candidates,
        key=lambda stage: policy.priority(stage, progress.started[stage]),
        default=None,
    )
