"""Proof that a schedule is complete, in order and cannot hang; and its figures.

Four passes, from what can be said about one action to what needs them all:

1. complete: every stage and message once for each microbatch, on its rank
2. order:    what an action reads was made or received earlier on the same rank
3. no hang:  the dry run under the link contract (see `dry_run`) reaches the end
4. bound:    no rank has more microbatches in flight than allowed
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
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
            `Stage.seconds`; a message is there after `Message.seconds`, for which
            nobody is busy.
        bubble: share of rank time that is idle, 1 - busy / (ranks * seconds).
            GPipe and 1F1B on a chain: (p - 1) / (m + p - 1).
        peak_live: for each pp_rank, the most microbatches in flight on it at once:
            started there, and not yet through all backwards that hold them.
        messages: sends in the whole schedule.
        peak_pieces: likewise with every forward stage counted for itself: a rank with
            two pieces has in memory between one and two times what peak_live says.
        span: the most seconds that one rank needs from its first stage to its last.
            It is what a step costs in a run of many, if each rank goes on to the next
            one when it is done: the cost of Zero Bubble, arXiv 2401.10241, section 2.
    """

    seconds: float
    bubble: float
    peak_live: tuple[int, ...]
    messages: int
    peak_pieces: tuple[int, ...] = ()
    span: float = 0.0


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
    ranks = range(pipeline.num_ranks)
    for rank in ranks:
        _check_complete(schedule, pipeline, rank, num_microbatches)
        _check_order(schedule, pipeline, rank)
    took = [stage.seconds for stage in pipeline.stages]

    def duration(action: Action) -> float:
        return took[action.stage] if action.kind.is_compute else 0.0

    ends = dry_run(schedule, pipeline, duration)
    peaks = [_peaks(schedule, pipeline, rank, active_microbatches) for rank in ranks]
    seconds = max((times[-1] for times in ends if times), default=0.0)
    total = pipeline.num_ranks * seconds
    idle = total - num_microbatches * sum(took)
    return Report(
        seconds=seconds,
        bubble=idle / total if total else 0.0,
        peak_live=tuple(live for live, _ in peaks),
        messages=sum(a.kind.is_send for actions in schedule.ranks for a in actions),
        peak_pieces=tuple(pieces for _, pieces in peaks),
        span=_span(schedule, ends, took),
    )


def _span(
    schedule: Schedule, ends: Sequence[Sequence[float]], took: Sequence[float]
) -> float:
    """The longest time of a rank from the start of its first compute to its last."""
    longest = 0.0
    for actions, times in zip(schedule.ranks, ends):
        computed = [
            (end - took[action.stage], end)
            for action, end in zip(actions, times)
            if action.kind.is_compute
        ]
        if computed:
            longest = max(longest, computed[-1][1] - computed[0][0])
    return longest


def _check_complete(
    schedule: Schedule, pipeline: Pipeline, rank: int, num_microbatches: int
) -> None:
    """Check that a rank has all its actions once, and no others."""
    duties = _duties(pipeline, rank, schedule.has_messages)
    seen = set()
    for step, action in enumerate(schedule.ranks[rank]):
        key = (action.mb, action.stage, action.peer)
        if key in seen:
            raise schedule.error(f"{action} for the second time", (rank, step))
        is_own = duties.get((action.stage, action.peer)) is action.kind
        if not is_own or action.mb >= num_microbatches:
            raise schedule.error(
                f"{action} does not belong here; {_describe(action, pipeline)}, "
                f"num_microbatches={num_microbatches}",
                (rank, step),
            )
        seen.add(key)
    if len(seen) == num_microbatches * len(duties):
        return
    expected = [
        Action(kind, stage, mb, peer)
        for mb in range(num_microbatches)
        for (stage, peer), kind in duties.items()
    ]
    for action in expected:
        if (action.mb, action.stage, action.peer) in seen:
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
) -> dict[tuple[int, int | None], Kind]:
    """Map (stage, peer) to the kind of what a rank does for each microbatch."""
    duties: dict[tuple[int, int | None], Kind] = {
        (index, None): stage.kind
        for index, stage in enumerate(pipeline.stages)
        if stage.rank == rank
    }
    for message in pipeline.messages if with_messages else ():
        source = pipeline.stages[message.stage]
        if source.rank == rank:
            duties[message.stage, message.peer] = source.kind.send
        if message.peer == rank:
            duties[message.stage, source.rank] = source.kind.recv
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
    reads = _reads_here(pipeline, rank, schedule.has_messages)
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
        kind = action.kind
        own = (action.stage,) if kind.is_send else ()
        for need in reads[action.stage] if kind.is_compute else own:
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
    pipeline: Pipeline, rank: int, has_messages: bool
) -> dict[int, tuple[int, ...]]:
    """For each stage of a rank, those whose outputs must lie there before it."""
    stages = pipeline.stages
    return {
        index: tuple(
            need for need in stage.needs if has_messages or stages[need].rank == rank
        )
        for index, stage in enumerate(stages)
        if stage.rank == rank
    }


def _peaks(
    schedule: Schedule, pipeline: Pipeline, rank: int, limit: int | None
) -> tuple[int, int]:
    """Return the most microbatches in flight, and the most at single stages, summed.

    In a schedule that cannot hang a holder comes after what it lets go of.

    Raises:
        ScheduleError: more than the limit are in flight.
    """
    holders = {
        index: pipeline.holders[index]
        for index, stage in enumerate(pipeline.stages)
        if stage.rank == rank and pipeline.holders[index]
    }
    held: dict[int, list[int]] = defaultdict(list)
    for index, backwards in holders.items():
        for backward in backwards:
            held[backward].append(index)
    left: dict[int, int] = {}  # microbatch in flight -> backwards still to come
    left_of: dict[tuple[int, int], int] = {}  # (stage, microbatch) -> likewise
    peak = peak_pieces = 0
    for step, action in enumerate(schedule.ranks[rank]):
        if not action.kind.is_compute:
            continue
        mb = action.mb
        if action.stage in holders:
            left.setdefault(mb, len(held))
            left_of[action.stage, mb] = len(holders[action.stage])
            peak, peak_pieces = max(peak, len(left)), max(peak_pieces, len(left_of))
        elif action.stage in held:
            left[mb] -= 1
            if not left[mb]:
                del left[mb]
            for index in held[action.stage]:
                left_of[index, mb] -= 1
                if not left_of[index, mb]:
                    del left_of[index, mb]
        if limit is not None and len(left) > limit:
            raise schedule.error(
                f"{action} is one microbatch in flight too many; "
                f"in_flight={sorted(left)}, active_microbatches={limit}",
                (rank, step),
            )
    return peak, peak_pieces
