"""Recorded runs as a simulation gives them: of more ranks than a laptop has cores."""

import random
from pathlib import Path
from typing import NamedTuple

from smp_tf.plan import schedules
from smp_tf.plan.action import Kind, Pipeline, Schedule, Stage
from smp_tf.plan.check import check
from smp_tf.plan.comm import add_messages
from smp_tf.plan.dry_run import dry_run
from smp_tf.report.timeline.file import (
    RunText,
    Writer,
    file_name,
    head_text,
    step_text,
    tail_text,
)
from smp_tf.report.timeline.folder import RecordedRun
from smp_tf.report.timeline.plan import PlannedStep, PredictedCall
from smp_tf.report.timeline.run import BEGIN, END, Label, RankRun, Span

SIZE = 1 << 20  # bytes of a message
MS = 1_000_000


class Event(NamedTuple):
    """``transport.events.Event``, without the compiled library."""

    program: int
    event: int
    run: int
    start_ns: int
    end_ns: int
    bytes: int = 0


def run_text(run: RankRun, planned: PlannedStep, writer: Writer) -> str:
    """A run as the events that it was made of, and these as text."""
    spans = [*run.calls, *run.waits, *run.sends]
    events = [
        Event(0, index, run.run, span.start_ns, span.end_ns, span.bytes)
        for index, span in enumerate(spans)
    ]
    ends = Event(0, BEGIN, run.run, run.start_ns, run.start_ns), Event(
        0, END, run.run, run.end_ns, run.end_ns
    )
    labels = [Label(span.action, span.tensor) for span in spans]
    return RunText(planned, labels, writer).of([ends[0], *events, ends[1]])


def split_chain(ranks: int) -> Pipeline:
    """A chain whose backwards are split into I and W."""
    stages = [Stage(Kind.F, r, (r - 1,) if r else ()) for r in range(ranks)]
    for rank in reversed(range(ranks)):
        needs = (rank, len(stages) - 2) if rank < ranks - 1 else (rank,)
        stages.append(Stage(Kind.I, rank, needs))
        stages.append(Stage(Kind.W, rank, (rank, len(stages) - 1)))
    return Pipeline.from_stages(stages, ranks)


def ended(
    schedule: Schedule, pipeline: Pipeline, jitter: float, delay: float, seed: int
) -> tuple[tuple[float, ...], ...]:
    rng = random.Random(seed)

    def duration(action):
        if action.kind.is_compute:
            seconds = pipeline.stages[action.stage].seconds
            return seconds * rng.uniform(1, 1 + jitter)
        return delay if action.kind.is_recv else 0.0

    return dry_run(schedule, pipeline, duration)


def example_run(
    ranks: int = 2,
    microbatches: int = 4,
    name: str = "interleaved",
    pipeline: Pipeline | None = None,
    jitter: float = 0.15,
    delay: float = 0.05,
    run: int = 1,
    unit_ms: float = 2.0,
) -> RecordedRun:
    """A run whose calls take ``unit_ms`` for each second of the plan, and jitter."""
    pipeline = pipeline or Pipeline.chain(ranks, 1.0, 2.0)
    order = schedules.build(name, pipeline, microbatches, ranks + 2)
    schedule = add_messages(order, pipeline)
    report = check(schedule, pipeline, microbatches)
    exact = ended(schedule, pipeline, 0.0, 0.0, 0)
    calls = tuple(
        tuple(
            PredictedCall(a, end - pipeline.stages[a.stage].seconds, end)
            for a, end in zip(actions, times)
            if a.kind.is_compute
        )
        for actions, times in zip(schedule.ranks, exact)
    )
    planned = PlannedStep(
        0, "train_step", name, microbatches, report.seconds, report.bubble, calls
    )
    times = ended(schedule, pipeline, jitter, delay, run)
    unit = unit_ms * MS
    zero = 10**13 + run * 10**9
    runs = []
    for rank, actions in enumerate(schedule.ranks):
        clock, spans = 0.0, {"call": [], "wait": [], "send": []}
        for action, end in zip(actions, times[rank]):
            start = zero + int(clock * unit) + MS // 100
            stop = max(zero + int(end * unit), start)
            kind = "wait" if action.kind.is_recv else "send"
            if action.kind.is_compute:
                spans["call"].append(Span(action, start, stop))
            else:
                stop += MS // 10 if action.kind.is_send else 0
                spans[kind].append(Span(action, start, stop, f"t{action.stage}", SIZE))
            clock = end
        stop = zero + int(max(t[-1] for t in times) * unit) + MS // 5
        runs.append(RankRun(0, run, zero, stop, *map(tuple, spans.values())))
    return RecordedRun(planned, tuple(range(ranks)), tuple(runs), 37, 120, True)


def example_folder(
    folder: Path,
    *,
    runs: int = 3,
    closed: bool = True,
    session: str = "abc",
    started: float = 1.0,
    **options: object,
) -> list[RecordedRun]:
    """Write the files of some runs; the runs."""
    made = [example_run(run=run + 1, **options) for run in range(runs)]
    for pp_rank, rank in enumerate(made[0].group):
        writer = Writer(rank, pp_rank, made[0].group, session, started)
        text = head_text(writer) + step_text(rank, made[0].planned)
        text += "".join(
            run_text(each.ranks[pp_rank], each.planned, writer) for each in made
        )
        if closed:
            text += tail_text(rank, 0)
        (folder / file_name(rank)).write_text(text)
    return made
