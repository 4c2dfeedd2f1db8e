"""A folder of trace files: which ranks, which runs, and one run of all of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path

from smp_tf.errors import SmpError
from smp_tf.report.timeline.file import RankTrace, RunHead, file_name, read_trace
from smp_tf.report.timeline.plan import PlannedStep
from smp_tf.report.timeline.run import RankRun
from smp_tf.report.timeline.stats import StepStats, rank_stats


@dataclasses.dataclass(frozen=True)
class RecordedRun:
    """One run of a step on all ranks of a replica.

    Attributes:
        planned: what was predicted.
        group: pp_rank -> world rank.
        ranks: what each pp_rank did, on one clock.
        place: of this run among ``count`` complete runs of the step, from 0.
        is_typical: it was chosen for its median step time.
        clock_error_seconds: by how much times of two ranks may be wrong.
    """

    planned: PlannedStep
    group: tuple[int, ...]
    ranks: tuple[RankRun, ...]
    place: int = 0
    count: int = 1
    is_typical: bool = False
    clock_error_seconds: float = 0.0

    @property
    def start_ns(self) -> int:
        return min(run.start_ns for run in self.ranks)

    @property
    def end_ns(self) -> int:
        return max(run.end_ns for run in self.ranks)

    @property
    def stats(self) -> StepStats:
        return StepStats(
            self.planned.name,
            self.ranks[0].run,
            tuple(
                rank_stats(run, self.group, pp_rank)
                for pp_rank, run in enumerate(self.ranks)
            ),
            self.planned.bubble,
        )


@dataclasses.dataclass(frozen=True)
class Folder:
    """The traces of one job.

    Attributes:
        traces: by world rank.
        ignored: files of earlier jobs.
    """

    path: Path
    traces: tuple[RankTrace, ...]
    ignored: tuple[Path, ...] = ()

    @property
    def replicas(self) -> list[tuple[RankTrace, ...]]:
        """Traces of each replica, by pp_rank; those that miss a rank are left out."""
        by_rank = {trace.writer.rank: trace for trace in self.traces}
        groups = sorted({trace.writer.group for trace in self.traces})
        return [
            tuple(by_rank[rank] for rank in group)
            for group in groups
            if all(rank in by_rank for rank in group)
        ]

    def choose(
        self, name: str | None = None, place: int | None = None, replica: int = 0
    ) -> RecordedRun:
        """One run.

        Args:
            name: of a step; the one that took most time if not said.
            place: of the run among the complete ones of the step; the one with the
                median step time if not said.

        Raises:
            SmpError: there is none, and which there are.
        """
        traces = self._replica(replica)
        runs = _complete_runs(traces)
        if not runs:
            raise SmpError(
                f"no run of a step is complete on all ranks: folder={self.path}"
                f" ranks={list(traces[0].writer.group)}"
            )
        step = _chosen_step(traces[0], runs, name)
        mine = [heads for heads in runs if heads[0].step == step]
        chosen = _median(mine) if place is None else place
        if not 0 <= chosen < len(mine):
            raise SmpError(
                f"no such run: step={chosen}; {traces[0].steps[step].name} has complete"
                f" runs 0..{len(mine) - 1}"
            )
        return RecordedRun(
            traces[0].steps[step],
            traces[0].writer.group,
            tuple(
                trace.load(head)
                for trace, head in zip(traces, mine[chosen], strict=True)
            ),
            chosen,
            len(mine),
            place is None,
            2 * max(trace.writer.error_ns for trace in traces) / 1e9,
        )

    def _replica(self, index: int) -> tuple[RankTrace, ...]:
        replicas = self.replicas
        if not replicas:
            missing = sorted(
                {rank for trace in self.traces for rank in trace.writer.group}
                - {trace.writer.rank for trace in self.traces}
            )
            raise SmpError(
                f"traces of some ranks are missing: folder={self.path} missing="
                f"{[file_name(rank) for rank in missing]}"
            )
        if not 0 <= index < len(replicas):
            raise SmpError(
                f"no such replica: replica={index}; there are 0..{len(replicas) - 1}"
            )
        return replicas[index]


def read_folder(path: Path) -> Folder:
    """Read all traces of the newest job in a folder.

    Raises:
        SmpError: there are none, or one of them cannot be read.
    """
    if not path.is_dir():
        raise SmpError(f"no such folder: {path}")
    files = sorted(path.glob(file_name("*")))
    if not files:
        missing = file_name("<k>")
        raise SmpError(f"no trace files in folder={path}: {missing} is missing")
    traces = [read_trace(file) for file in files]
    newest = max(traces, key=lambda trace: trace.writer.started).writer.session
    ours = [trace for trace in traces if trace.writer.session == newest]
    ignored = [trace.path for trace in traces if trace.writer.session != newest]
    ours.sort(key=lambda trace: trace.writer.rank)
    return Folder(path, tuple(ours), tuple(ignored))


def _complete_runs(traces: Sequence[RankTrace]) -> list[tuple[RunHead, ...]]:
    """The heads of each run that all ranks have, in the order of the runs."""
    by_run = [
        {(head.step, head.run): head for head in trace.heads} for trace in traces
    ]
    common = set(by_run[0]).intersection(*by_run[1:])
    return [
        tuple(heads[key] for heads in by_run)
        for key in sorted(common, key=lambda key: key[1])
    ]


def _chosen_step(
    trace: RankTrace, runs: Iterable[Sequence[RunHead]], name: str | None
) -> int:
    totals: dict[int, float] = {}
    for heads in runs:
        step = heads[0].step
        totals[step] = totals.get(step, 0.0) + max(head.seconds for head in heads)
    fitting = {
        step: seconds
        for step, seconds in totals.items()
        if name is None or trace.steps[step].name == name
    }
    if not fitting:
        known = sorted({trace.steps[step].name for step in totals})
        raise SmpError(f"no complete run of step={name!r}; there are {known}")
    return max(fitting, key=lambda step: fitting[step])


def _median(runs: Sequence[Sequence[RunHead]]) -> int:
    seconds = [max(head.seconds for head in heads) for heads in runs]
    order = sorted(range(len(runs)), key=lambda index: seconds[index])
    return order[(len(order) - 1) // 2]
