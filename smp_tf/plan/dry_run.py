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

A message is there `Message.seconds` after it was sent; its sender goes on at once. In
a schedule without messages outputs leave the moment they are made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Action, Message, Pipeline, Schedule

__all__ = ["dry_run", "time_steps"]

_Key = tuple[int, int, "int | None"]
"""Stage, microbatch and peer of a computation or a send: cheaper than the Action."""


def dry_run(
    schedule: Schedule,
    pipeline: Pipeline,
    duration: Callable[[Action], float],
    on_the_way: Callable[[Message], float] = lambda message: message.seconds,
) -> tuple[tuple[float, ...], ...]:
    """Simulate a schedule that is complete and in order on each rank.

    Args:
        schedule: with or without messages.
        pipeline: the pipeline it was built for.
        duration: how long each action takes its rank.
        on_the_way: how long after its send, or after the stage where the schedule
            has no messages, a message is there. Nobody is busy with it.

    Returns:
        The time at which each action ends, one tuple for each rank.

    Raises:
        ScheduleError: ranks wait for each other; names who waits for whom.
    """
    has_messages = schedule.has_messages
    seconds_to = {(m.stage, m.peer): on_the_way(m) for m in pipeline.messages}
    needs = _needs_of_others(pipeline)
    ends: list[list[float]] = [[] for _ in schedule.ranks]
    end_of: dict[_Key, float] = {}  # of what others may wait for: compute and sends
    waiting: dict[_Key, list[int]] = defaultdict(list)  # action -> ranks
    runnable = list(range(len(schedule.ranks)))
    while runnable:
        rank = runnable.pop()
        own, actions = ends[rank], schedule.ranks[rank]
        clock = own[-1] if own else 0.0
        for position in range(len(own), len(actions)):
            action = actions[position]
            stage, mb, kind = action.stage, action.mb, action.kind
            cause: _Key | None = None
            if kind.is_recv:
                cause = (stage, mb, rank)
                if cause in end_of:
                    clock = max(clock, end_of[cause] + seconds_to[stage, rank])
                    cause = None
            elif not has_messages:
                for need in needs[stage]:
                    if (need, mb, None) not in end_of:
                        cause = (need, mb, None)
                        break
                    arrival = end_of[need, mb, None] + seconds_to[need, rank]
                    clock = max(clock, arrival)
            if cause is not None:
                waiting[cause].append(rank)
                break
            clock += duration(action)
            own.append(clock)
            if not kind.is_recv:
                key = (stage, mb, action.peer)
                end_of[key] = clock
                if key in waiting:
                    runnable += waiting.pop(key)
    if waiting:
        raise _deadlock(schedule, [len(times) for times in ends], waiting)
    return tuple(map(tuple, ends))


def time_steps(schedule: Schedule, pipeline: Pipeline) -> tuple[tuple[int, ...], ...]:
    """Return the step of each action if every action, a message too, took one.

    These are the columns of `Schedule.grid` that draw a schedule the way the
    field draws it.
    """
    ends = dry_run(schedule, pipeline, lambda action: 1.0, lambda message: 0.0)
    return tuple(tuple(int(end) - 1 for end in times) for times in ends)


def _needs_of_others(pipeline: Pipeline) -> list[list[int]]:
    """For each stage, the stages of other ranks that it needs."""
    stages = pipeline.stages
    return [
        [need for need in stage.needs if stages[need].rank != stage.rank]
        for stage in stages
    ]


def _deadlock(
    schedule: Schedule, reached: list[int], waiting: dict[_Key, list[int]]
) -> ScheduleError:
    """Describe one circle of ranks that wait for each other.

    Args:
        schedule: what was run.
        reached: for each rank, the position at which it stands.
        waiting: action -> the ranks that wait for it.
    """
    place = {
        (action.stage, action.mb, action.peer): (rank, step)
        for rank, actions in enumerate(schedule.ranks)
        for step, action in enumerate(actions)
        if not action.kind.is_recv
    }
    awaited = {rank: place[key] for key, ranks in waiting.items() for rank in ranks}
    # Each stuck rank waits for one that is stuck before what it should give, so
    # walking from rank to rank must come back to where it has been.
    path = [min(awaited)]
    while awaited[path[-1]][0] not in path:
        path.append(awaited[path[-1]][0])
    circle = path[path.index(awaited[path[-1]][0]):]
    first = circle.index(min(circle))
    circle = circle[first:] + circle[:first]
    lines = []
    for rank in circle:
        other, step = awaited[rank]
        lines.append(
            f"rank {rank} step {reached[rank]}: {schedule.ranks[rank][reached[rank]]} "
            f"waits for {schedule.ranks[other][step]}, step {step} of rank {other}"
        )
    return schedule.error(
        "deadlock; " + "; ".join(lines), *((rank, reached[rank]) for rank in circle)
    )
