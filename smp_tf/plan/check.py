"""Proof that a schedule is complete, in order and cannot hang; and its figures.

Three passes, from what can be said about one action to what needs them all:

1. complete: every stage and message once for each microbatch, on its rank
2. order:    what an action reads was made or received earlier on the same rank
3. no hang:  the dry run under the link contract (see `dry_run`) reaches the end
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Action, Kind, Pipeline, Schedule
from smp_tf.plan.dry_run import dry_run

__all__ = ["Report", "check"]


@dataclass(frozen=True)
class Report:
    """Figures of a schedule that passed every check.

    Attributes:
        seconds: simulated time from the first action to the last. Compute takes
            `Stage.seconds`, messages take no time.
        bubble: share of rank time that is idle, 1 - busy / (ranks * seconds).
            GPipe and 1F1B on a chain: (p - 1) / (m + p - 1).
        peak_live: for each pp_rank, the most microbatches in flight on it at once:
            started there, and not yet through all backwards that hold them.
        messages: sends in the whole schedule.
    """

    seconds: float
    bubble: float
    peak_live: tuple[int, ...]
    messages: int


def check(
    schedule: Schedule,
    pipeline: Pipeline,
    num_microbatches: int,
    active_microbatches: int | None = None,
) -> Report:
    """Check a schedule, with or without messages, and measure it.

    Args:
        schedule: what every rank is to do.
        pipeline: the stages and messages it must cover.
        num_microbatches: how many there are.
        active_microbatches: the most that may be in flight on one rank; None for
            no limit, as `simple` needs it.

    Raises:
        ScheduleError: the first rule that is broken, with rank and step, the
            schedule as a grid, and the offending action in [brackets].
    """
    if len(schedule.ranks) != pipeline.num_ranks:
        raise ScheduleError(
            "a schedule has one list for each rank; "
            f"ranks={len(schedule.ranks)}, num_ranks={pipeline.num_ranks}"
        )
    peak_live = []
    for rank in range(pipeline.num_ranks):
        _check_complete(schedule, pipeline, rank, num_microbatches)
        _check_order(schedule, pipeline, rank)
        peak_live.append(_peak_live(schedule, pipeline, rank, active_microbatches))
    ends = dry_run(
        schedule,
        pipeline,
        lambda action: (
            pipeline.stages[action.stage].seconds if action.kind.is_compute else 0.0
        ),
    )
    seconds = max((times[-1] for times in ends if times), default=0.0)
    busy = num_microbatches * sum(stage.seconds for stage in pipeline.stages)
    return Report(
        seconds=seconds,
        bubble=1 - busy / (pipeline.num_ranks * seconds) if seconds else 0.0,
        peak_live=tuple(peak_live),
        messages=sum(a.kind.is_send for actions in schedule.ranks for a in actions),
    )


def _check_complete(
    schedule: Schedule, pipeline: Pipeline, rank: int, num_microbatches: int
) -> None:
    """Check that a rank has all its actions once, and no others."""
    expected = dict.fromkeys(
        Action(kind, stage, mb, peer)
        for mb in range(num_microbatches)
        for kind, stage, peer in _duties(pipeline, rank, schedule.has_messages)
    )
    seen = set()
    for step, action in enumerate(schedule.ranks[rank]):
        if action in seen:
            raise schedule.error(f"{action} for the second time", (rank, step))
        if action not in expected:
            raise schedule.error(
                f"{action} does not belong here; {_describe(action, pipeline)}, "
                f"num_microbatches={num_microbatches}",
                (rank, step),
            )
        seen.add(action)
    for action in expected:
        if action in seen:
            continue
        if action.peer is None:
            raise schedule.error(f"rank {rank}: {action} is missing")
        # Show the end that is there: it would be sent into the void, or wait for
        # ever.
        other = action.kind.recv if action.kind.is_send else action.kind.send
        end = Action(other, action.stage, action.mb, rank)
        there = schedule.ranks[action.peer]
        if end in there:
            raise schedule.error(
                f"{end} has no {action} on rank {rank}",
                (action.peer, there.index(end)),
            )
        raise schedule.error(f"rank {rank}: {action} is missing")


def _duties(
    pipeline: Pipeline, rank: int, with_messages: bool
) -> list[tuple[Kind, int, int | None]]:
    """List (kind, stage, peer) of what a rank does for each microbatch."""
    duties: list[tuple[Kind, int, int | None]] = [
        (stage.kind, index, None)
        for index, stage in enumerate(pipeline.stages)
        if stage.rank == rank
    ]
    for message in pipeline.messages if with_messages else ():
        source = pipeline.stages[message.stage]
        if source.rank == rank:
            duties.append((source.kind.send, message.stage, message.peer))
        if message.peer == rank:
            duties.append((source.kind.recv, message.stage, source.rank))
    return duties


def _describe(action: Action, pipeline: Pipeline) -> str:
    """Say where an action that stands in the wrong place would belong."""
    if not 0 <= action.stage < len(pipeline.stages):
        return f"stages={len(pipeline.stages)}"
    source = pipeline.stages[action.stage]
    peers = [m.peer for m in pipeline.messages if m.stage == action.stage]
    return (
        f"stage {action.stage} is {source.kind.value} of rank {source.rank} and "
        f"goes to ranks {peers}"
    )


def _check_order(schedule: Schedule, pipeline: Pipeline, rank: int) -> None:
    """Check that a rank has made or received whatever it reads or sends."""
    here: set[tuple[int, int]] = set()  # (stage, mb)
    next_mb: Counter[int] = Counter()
    for step, action in enumerate(schedule.ranks[rank]):
        if action.kind.is_compute:
            if action.mb != next_mb[action.stage]:
                raise schedule.error(
                    f"{action} out of turn; a stage takes its microbatches in "
                    f"ascending order, next={next_mb[action.stage]}",
                    (rank, step),
                )
            next_mb[action.stage] += 1
            for other in pipeline.stages[action.stage].after:
                if next_mb[other] < action.mb:
                    raise schedule.error(
                        f"{action} before stage {other} is done with the microbatch "
                        "before it; both use a variable that the step writes",
                        (rank, step),
                    )
        for need in _reads_here(action, pipeline, schedule.has_messages):
            if (need, action.mb) not in here:
                source = pipeline.stages[need]
                made = f"{need}{source.kind.value}{action.mb}"
                late = (
                    "has not run"
                    if source.rank == rank
                    else f"has not arrived from rank {source.rank}"
                )
                raise schedule.error(
                    f"{action} takes the outputs of {made}, which {late} before it",
                    (rank, step),
                )
        if not action.kind.is_send:
            here.add((action.stage, action.mb))


def _reads_here(
    action: Action, pipeline: Pipeline, has_messages: bool
) -> tuple[int, ...]:
    """List the stages whose outputs must already lie on the rank of an action."""
    if action.kind.is_send:
        return (action.stage,)
    if action.kind.is_recv:
        return ()
    stage = pipeline.stages[action.stage]
    if has_messages:
        return stage.needs
    return tuple(n for n in stage.needs if pipeline.stages[n].rank == stage.rank)


def _peak_live(
    schedule: Schedule, pipeline: Pipeline, rank: int, limit: int | None
) -> int:
    """Return the most microbatches in flight on a rank; check the limit."""
    keeping = {
        index
        for index, stage in enumerate(pipeline.stages)
        if stage.rank == rank and pipeline.holders[index]
    }
    letting_go = {holder for index in keeping for holder in pipeline.holders[index]}
    left: dict[int, int] = {}  # microbatch in flight -> backwards still to come
    peak = 0
    for step, action in enumerate(schedule.ranks[rank]):
        if not action.kind.is_compute:
            continue
        if action.stage in keeping:
            left.setdefault(action.mb, len(letting_go))
            peak = max(peak, len(left))
        elif action.stage in letting_go:
            left[action.mb] -= 1
            if not left[action.mb]:
                del left[action.mb]
        if limit is not None and len(left) > limit:
            raise schedule.error(
                f"{action} is one microbatch in flight too many; "
                f"in_flight={sorted(left)}, active_microbatches={limit}",
                (rank, step),
            )
    return peak
