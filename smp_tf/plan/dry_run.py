"""A schedule on a simulated clock, under the link contract.

The *link contract* says what a message waits for:

- A rank takes its actions strictly in order.
- A send never waits for its receive. The message lies in its channel, one channel
  for each (stage, microbatch, peer), until it is received: every channel holds one
  unreceived message.
- A receive waits until its message is there.

With sends that wait, 1F1B would deadlock: rank 0 stuck at a SEND_F, rank 1 at a
SEND_B. So the contract is part of every proof made here: `runtime` emits no edge
from the end of a send to the next action, and the transport tests hold the
transport to its word.

A schedule without messages is run as if everything arrived the moment it is made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Action, Pipeline, Schedule

__all__ = ["dry_run", "time_steps"]


def dry_run(
    schedule: Schedule, pipeline: Pipeline, duration: Callable[[Action], float]
) -> tuple[tuple[float, ...], ...]:
    """Simulate a schedule that is complete and in order on each rank.

    Args:
        schedule: with or without messages.
        pipeline: the pipeline it was built for.
        duration: how long each action takes.

    Returns:
        The time at which each action ends, one tuple for each rank.

    Raises:
        ScheduleError: ranks wait for each other; names who waits for whom.
    """
    has_messages = schedule.has_messages
    ends: list[list[float]] = [[] for _ in schedule.ranks]
    end_of: dict[Action, float] = {}  # of what others may wait for: F, B and sends
    waiting: dict[Action, list[int]] = defaultdict(list)  # action -> ranks
    runnable = list(range(len(schedule.ranks)))
    while runnable:
        rank = runnable.pop()
        clock = ends[rank][-1] if ends[rank] else 0.0
        for action in schedule.ranks[rank][len(ends[rank]):]:
            causes = _causes(action, rank, pipeline, has_messages)
            late = [cause for cause in causes if cause not in end_of]
            if late:
                waiting[late[0]].append(rank)
                break
            clock = max([clock, *(end_of[cause] for cause in causes)])
            clock += duration(action)
            ends[rank].append(clock)
            if not action.kind.is_recv:
                end_of[action] = clock
                runnable += waiting.pop(action, ())
    if waiting:
        raise _deadlock(schedule, [len(times) for times in ends], waiting)
    return tuple(map(tuple, ends))


def time_steps(schedule: Schedule, pipeline: Pipeline) -> tuple[tuple[int, ...], ...]:
    """Return the step of each action if every action, a message too, took one.

    These are the columns of `Schedule.grid` that draw a schedule the way the
    field draws it.
    """
    ends = dry_run(schedule, pipeline, lambda action: 1.0)
    return tuple(tuple(int(end) - 1 for end in times) for times in ends)


def _causes(
    action: Action, rank: int, pipeline: Pipeline, has_messages: bool
) -> list[Action]:
    """List the actions of other ranks that this action waits for."""
    if action.kind.is_recv:
        return [Action(action.kind.send, action.stage, action.mb, peer=rank)]
    if has_messages:
        return []
    stages = pipeline.stages
    return [
        Action(stages[need].kind, need, action.mb)
        for need in stages[action.stage].needs
        if stages[need].rank != rank
    ]


def _deadlock(
    schedule: Schedule, reached: list[int], waiting: dict[Action, list[int]]
) -> ScheduleError:
    """Describe one circle of ranks that wait for each other.

    Args:
        schedule: what was run.
        reached: for each rank, the position at which it stands.
        waiting: action -> the ranks that wait for it.
    """
    holder = {
        action: rank
        for rank, actions in enumerate(schedule.ranks)
        for action in actions
        if not action.kind.is_recv
    }
    awaited = {rank: action for action, ranks in waiting.items() for rank in ranks}
    # Each stuck rank waits for one that is stuck before what it should give, so
    # walking from rank to rank must come back to where it has been.
    path = [min(awaited)]
    while holder[awaited[path[-1]]] not in path:
        path.append(holder[awaited[path[-1]]])
    circle = path[path.index(holder[awaited[path[-1]]]):]
    first = circle.index(min(circle))
    circle = circle[first:] + circle[:first]
    lines = [
        f"rank {rank} step {reached[rank]}: {schedule.ranks[rank][reached[rank]]} "
        f"waits for {awaited[rank]}, step "
        f"{schedule.ranks[holder[awaited[rank]]].index(awaited[rank])} of rank "
        f"{holder[awaited[rank]]}"
        for rank in circle
    ]
    return schedule.error(
        "deadlock; " + "; ".join(lines), *((rank, reached[rank]) for rank in circle)
    )
