"""``smp.last_step_stats()``: what the last step did, on all ranks."""

import dataclasses

from smp_tf.errors import SmpError
from smp_tf.report.timeline.run import run_of_events
from smp_tf.report.timeline.stats import RankStats, StepStats, rank_stats
from smp_tf.runtime import session, timeline_steps


@dataclasses.dataclass(frozen=True)
class _Mine:
    """What a rank tells the others."""

    step: int
    run: int
    name: str
    predicted_bubble: float
    stats: RankStats


def last_step_stats() -> StepStats:
    """Figures of the last step that ran, gathered from all ranks of the mp_group.

    Every rank of the mp_group must call it, after the same step. Recording is always
    on and needs no configuration; every rank's times are its own, so that clocks play
    no part.

        print(smp.last_step_stats())

    Returns:
        Step time, bubble, bytes sent, and for each rank its busy time, for whom it
        waited how long, and its bytes in flight.

    Raises:
        SmpError: on every rank, if one of them has run no step or cannot record, or if
            their last steps are not the same run.
    """
    messages = session.current("last_step_stats").messages
    found = messages.allgather(_mine(), session.MP_GROUP)
    ranks = session.get_mp_group()
    for rank, each in zip(ranks, found, strict=True):
        if isinstance(each, str):
            raise SmpError(f"no figures of the last step: rank {rank}: {each}")
    first = found[0]
    for rank, each in zip(ranks, found, strict=True):
        if (each.step, each.run) != (first.step, first.run):
            raise SmpError(
                "last_step_stats must be called on all ranks after the same step:"
                f" rank {ranks[0]} last ran step={first.name} run={first.run},"
                f" rank {rank} step={each.name} run={each.run}"
            )
    stats = sorted((each.stats for each in found), key=lambda stats: stats.pp_rank)
    return StepStats(first.name, first.run, tuple(stats), first.predicted_bubble)


def _mine() -> _Mine | str:
    """This rank's part, or why there is none."""
    # Loads TensorFlow, which a process that only sends messages does not need.
    from smp_tf.transport import events

    try:
        last = events.last()
    except SmpError as error:
        return str(error)
    step = timeline_steps.find(last[0].program) if last else None
    if step is None:
        return "no step has run since smp.init()"
    run = run_of_events(step.number, last, step.labels)
    if not run.calls and any(label and not label.tensor for label in step.labels):
        return "what its segments took was not recorded; on GPUs it cannot be yet"
    figures = rank_stats(run, session.get_pp_group(), session.pp_rank())
    bubble = max(step.plan.report.bubble, 0.0)
    return _Mine(step.number, run.run, step.name, bubble, figures)
