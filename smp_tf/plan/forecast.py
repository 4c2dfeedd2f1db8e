"""What a plan means before anything is launched: memory, messages, time by schedule."""

import dataclasses
from collections.abc import Sequence

from smp_tf.errors import PartitionError
from smp_tf.plan.memory import RankMemory, memory_by_rank
from smp_tf.plan.segment import Cut
from smp_tf.plan.step_plan import StepPlan

_MIB = 2**20


@dataclasses.dataclass(frozen=True)
class ScheduleForecast:
    """One schedule of the plan's segments.

    Attributes:
        seconds: estimated, of one step; only ratios are worth anything without a
            profile.
        bubble: share of the ranks' time in which they wait.
        memory: of each rank.
    """

    pipeline: str
    seconds: float
    bubble: float
    memory: tuple[RankMemory, ...]

    @property
    def worst_bytes(self) -> int:
        """Of the fullest rank."""
        return max(each.total for each in self.memory)


@dataclasses.dataclass(frozen=True)
class Forecast:
    """A partitioned step, and how each schedule would run it. See ``smp.plan``.

    Attributes:
        plan: with the schedule that was configured.
        schedules: that one first, then the others that can run this step.
    """

    plan: StepPlan
    schedules: tuple[ScheduleForecast, ...]

    @property
    def memory(self) -> tuple[RankMemory, ...]:
        """Of each rank, with the configured schedule."""
        return self.schedules[0].memory

    @property
    def cuts(self) -> tuple[Cut, ...]:
        """Tensors that cross ranks, with their bytes of one microbatch."""
        return self.plan.segments.cuts

    @property
    def bytes_per_step(self) -> int:
        """That cross ranks in one step."""
        each = sum(cut.spec.num_bytes for cut in self.cuts)
        return each * self.plan.num_microbatches

    def fits(self, limit_bytes: int) -> bool:
        """Whether every rank needs at most so much."""
        return self.schedules[0].worst_bytes <= limit_bytes

    def __str__(self) -> str:
        """For people: memory by rank, what crosses, the schedules."""
        rows: list[tuple[str, ...]]
        rows = [("rank", "weights", "gradients", "optimizer", "activations", "total")]
        for rank, m in enumerate(self.memory):
            parts = (m.weights, m.gradients, m.optimizer, m.activations, m.total)
            rows.append((str(rank), *map(_mib, parts)))
        lines = ["MiB at the fullest moment of each rank", *_aligned(rows), ""]
        rows = [("tensor", "from", "to", "type", "MiB per step")]
        for cut in self.cuts:
            size = cut.spec.num_bytes * self.plan.num_microbatches
            ranks = str(cut.source), str(cut.peer)
            rows.append((cut.tensor, *ranks, str(cut.spec), _mib(size)))
        lines += ["what crosses ranks", *_aligned(rows), ""]
        rows = [("schedule", "seconds", "bubble", "fullest rank, MiB")]
        for each in self.schedules:
            figures = f"{each.seconds:.4g}", f"{each.bubble:.1%}"
            rows.append((each.pipeline, *figures, _mib(each.worst_bytes)))
        lines += ["estimated step by schedule", *_aligned(rows)]
        return "\n".join([*lines, *self.plan.advice])


def forecast(plans: Sequence[StepPlan | PartitionError]) -> Forecast:
    """Put together the plans of one step with different schedules.

    Args:
        plans: the configured one first; a schedule that cannot run the step has its
            error instead.

    Raises:
        PartitionError: the configured one cannot.
    """
    first = plans[0]
    if isinstance(first, PartitionError):
        raise first
    return Forecast(
        first,
        tuple(
            ScheduleForecast(
                plan.pipeline,
                plan.report.seconds,
                plan.report.bubble,
                memory_by_rank(plan),
            )
            for plan in plans
            if isinstance(plan, StepPlan)
        ),
    )


def _mib(size: int) -> str:
    return f"{size / _MIB:,.1f}" if size >= _MIB / 10 else f"{size / _MIB:.2g}"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Names to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            [row[0].ljust(widths[0])]
            + [c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True)]
        )
        for row in rows
    ]
