"""The one core of all schedules: list scheduling on a simulated clock.

Ranks run their stages for `Stage.seconds`. Whenever a rank is free it takes, of
the actions whose needs are there, the one that the policy prefers among those that
the policy allows; if there is none, it waits. The order that comes out needs no
clock any more: it is the schedule.

What a stage makes is there at its end for its own rank, and `Message.seconds` later for
another. The sender does not wait.

Why a policy cannot get stuck that only holds forward stages back, within `Limits`: a
stage takes its microbatches in ascending order, so what is in flight on a rank is never
older than the oldest unfinished microbatch. Take that microbatch, and its first
unfinished stage in the order of the pipeline. All it needs is done, and so is all it
comes `after`, for this has to do with older microbatches. If it is no forward stage
that keeps something, nothing forbids it. If it is, no older microbatch is in flight on
its rank, and a younger one only if this one is too, for a stage that started the
younger one started this one before. So it is the oldest there, or the first; and every
limit lets these through. `simple` makes backwards wait as well, but only for forwards,
and those wait for no backward.

A policy with an order of its own, as `steady` and `wave` have, may get stuck. That is
an error here; `portfolio` passes it over, and every schedule has one that cannot.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Action, Pipeline, Schedule
from smp_tf.plan.schedules.progress import Progress

__all__ = ["Order", "Policy", "PolicyStuck", "list_schedule"]


class PolicyStuck(ScheduleError):
    """A policy forbids everything that is left."""


class Policy(Protocol):
    """What tells one schedule from another.

    It may look at the stages of the same rank only: a rank is asked again when it
    ends something or when something arrives, not when others go on.
    """

    def priority(self, stage: int, mb: int) -> tuple[int, ...]:
        """Rank the actions that could start now: the smallest goes first."""

    def may_start(self, stage: int, progress: Progress) -> bool:
        """Whether the next microbatch of a ready stage may start now."""


@dataclass(frozen=True)
class Order:
    """What came out, and what the clock said about it.

    Attributes:
        stages: for each rank, the stages it runs, each time on its next microbatch.
        seconds: end of the last action.
        span: the longest time that one rank takes from its first start to its end.
        peak_live: for each rank, the most microbatches in flight.
        peak_pieces: for each rank, the most live microbatches, summed over stages.
    """

    stages: tuple[tuple[int, ...], ...]
    seconds: float
    span: float
    peak_live: tuple[int, ...]
    peak_pieces: tuple[int, ...]

    def schedule(self, pipeline: Pipeline) -> Schedule:
        """Write the order as actions, without messages."""
        kinds = [stage.kind for stage in pipeline.stages]
        next_mb = [0] * len(kinds)
        ranks = []
        for stages in self.stages:
            actions = []
            for stage in stages:
                actions.append(Action(kinds[stage], stage, next_mb[stage]))
                next_mb[stage] += 1
            ranks.append(tuple(actions))
        return Schedule(tuple(ranks))


def list_schedule(pipeline: Pipeline, num_microbatches: int, policy: Policy) -> Order:
    """Order all compute actions of a pipeline under a policy.

    Args:
        pipeline: stages and messages with their seconds per microbatch.
        num_microbatches: how often every stage runs; also fewer than ranks.
        policy: preferences and limits.

    Raises:
        ScheduleError: num_microbatches is below 1.
        PolicyStuck: the policy forbids everything that is left.
    """
    if num_microbatches < 1:
        raise ScheduleError(
            "a schedule has at least one microbatch; "
            f"num_microbatches={num_microbatches}"
        )
    run = _Run(pipeline, num_microbatches, policy)
    run.to_the_end()
    done = run.progress.done[: len(pipeline.stages)]
    stuck = [s for s, count in enumerate(done) if count < num_microbatches]
    if stuck:
        raise PolicyStuck(
            "the policy lets nothing start any more; "
            f"policy={type(policy).__name__}, stages={stuck}, "
            f"num_microbatches={num_microbatches}"
        )
    return Order(
        stages=tuple(map(tuple, run.order)),
        seconds=max(run.last_end),
        span=max(map(float.__sub__, run.last_end, run.first_start)),
        peak_live=tuple(run.peak_live),
        peak_pieces=tuple(run.peak_pieces),
    )


class _Run:
    """One simulation: the clock, what is under way, and what came of it."""

    def __init__(self, pipeline: Pipeline, num_microbatches: int, policy: Policy):
        self.progress = Progress(pipeline, num_microbatches)
        self.policy = policy
        ranks = range(pipeline.num_ranks)
        self.order: list[list[int]] = [[] for _ in ranks]
        self.first_start = [0.0 for _ in ranks]
        self.last_end = [0.0 for _ in ranks]
        self.peak_live = [0 for _ in ranks]
        self.peak_pieces = [0 for _ in ranks]
        self._rank = [stage.rank for stage in pipeline.stages]
        self._seconds = [stage.seconds for stage in pipeline.stages]
        self._free = [True for _ in ranks]
        # What ends or arrives next: (time, place in `Progress.done`).
        self._under_way: list[tuple[float, int]] = []
        # For each stage, its messages: (peer, seconds, place in `Progress.done`).
        self._sends: list[list[tuple[int, float, int]]] = [[] for _ in pipeline.stages]
        self._peer: list[int] = []
        for place, message in enumerate(pipeline.messages, len(pipeline.stages)):
            self._sends[message.stage].append((message.peer, message.seconds, place))
            self._peer.append(message.peer)

    def to_the_end(self) -> None:
        now = 0.0
        self._start_what_can(range(len(self._free)), now)
        while self._under_way:
            now = self._under_way[0][0]
            # All that happens at one instant counts before anyone chooses, or the
            # choice of one rank would depend on the number of another.
            asked: set[int] = set()
            while self._under_way and self._under_way[0][0] == now:
                self._happen(heapq.heappop(self._under_way)[1], now, asked)
            self._start_what_can(sorted(asked), now)

    def _happen(self, place: int, now: float, asked: set[int]) -> None:
        """Count an end or an arrival, and note the ranks it may set going."""
        if place >= len(self._rank):
            self.progress.done[place] += 1
            asked.add(self._peer[place - len(self._rank)])
            return
        rank = self._rank[place]
        self.progress.end(place)
        self._free[rank] = True
        self.last_end[rank] = now
        asked.add(rank)
        for peer, seconds, sent in self._sends[place]:
            if seconds > 0:
                heapq.heappush(self._under_way, (now + seconds, sent))
            elif seconds == 0:
                self.progress.done[sent] += 1
                asked.add(peer)

    def _start_what_can(self, ranks: Iterable[int], now: float) -> None:
        progress, policy = self.progress, self.policy
        for rank in ranks:
            if not self._free[rank]:
                continue
            stages = [s for s in progress.ready(rank) if policy.may_start(s, progress)]
            if not stages:
                continue
            stage = stages[0]
            if len(stages) > 1:
                started = progress.started
                stage = min(stages, key=lambda s: policy.priority(s, started[s]))
            if not self.order[rank]:
                self.first_start[rank] = now
            progress.start(stage)
            self.order[rank].append(stage)
            self._free[rank] = False
            end = now + self._seconds[stage]
            heapq.heappush(self._under_way, (end, stage))
            for _, seconds, sent in self._sends[stage]:
                if seconds < 0:  # leaves while the stage still runs
                    heapq.heappush(self._under_way, (max(end + seconds, now), sent))
            live = progress.newest[rank] - progress.oldest[rank]
            self.peak_live[rank] = max(self.peak_live[rank], live)
            self.peak_pieces[rank] = max(self.peak_pieces[rank], progress.pieces[rank])
