"""What a plan means before anything is launched: memory, messages, time by schedule."""

import dataclasses
import os
from collections.abc import Sequence

from smp_tf.errors import PartitionError
from smp_tf.plan.memory import RankMemory, memory_by_rank
from smp_tf.plan.segment import Cut
from smp_tf.plan.step_plan import StepPlan


@dataclasses.dataclass(frozen=True)
class ScheduleForecast:
    """One schedule of the plan's segments.

    Attributes:
        seconds: of one step: estimates, of which only ratios are worth anything; with
            a profile, the measured seconds of its parts in this schedule.
        bubble: share of the ranks' time in which they wait.
        memory: of each rank.
        examples_per_second: examples of a step by its seconds; None where the example
            inputs do not say how many they are.
    """

    pipeline: str
    seconds: float
    bubble: float
    memory: tuple[RankMemory, ...]
    examples_per_second: float | None = None

    @property
    def worst_bytes(self) -> int:
        """Of the fullest rank."""
        return max(each.total for each in self.memory)


@dataclasses.dataclass(frozen=True)
class CutTensor:
    """A tensor on its way from one rank to another, of all microbatches of a step."""

    name: str
    dtype: str
    shape: tuple[int | None, ...] | None
    source: int
    peer: int
    bytes_per_step: int


def cut_tensors(plan: StepPlan) -> tuple[CutTensor, ...]:
    """What crosses ranks: the cuts of a plan, with their bytes of a step."""
    return tuple(
        CutTensor(
            name=cut.tensor,
            dtype=cut.spec.dtype,
            shape=cut.spec.shape,
            source=cut.source,
            peer=cut.peer,
            bytes_per_step=cut.spec.num_bytes * plan.num_microbatches,
        )
        for cut in plan.segments.cuts
    )


@dataclasses.dataclass(frozen=True, repr=False)
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
    def cut_tensors(self) -> tuple[CutTensor, ...]:
        """The same with names, shapes and their bytes of a whole step."""
        return cut_tensors(self.plan)

    @property
    def bytes_per_step(self) -> int:
        """That cross ranks in one step."""
        return sum(each.bytes_per_step for each in self.cut_tensors)

    def fits(self, limit_bytes: int) -> bool:
        """Whether every rank needs at most so much."""
        return self.schedules[0].worst_bytes <= limit_bytes

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the partition to a file; see ``StepPlan.save``."""
        self.plan.save(path)

    def __repr__(self) -> str:
        """One line; ``smp.forecast_table`` has the rest."""
        first, plan = self.schedules[0], self.plan
        return (
            f"partitions={plan.num_partitions} microbatches={plan.num_microbatches}"
            f" pipeline={first.pipeline} worst_rank_bytes={first.worst_bytes}"
            f" bytes_per_step={self.bytes_per_step} bubble={first.bubble:.3f}"
        )


def forecast(
    plans: Sequence[StepPlan | PartitionError], num_examples: int | None = None
) -> Forecast:
    """Put together the plans of one step with different schedules.

    Args:
        plans: the configured one first; a schedule that cannot run the step has its
            error instead.
        num_examples: in the batch of one step, if known.

    Raises:
        PartitionError: the configured one cannot.
    """
    first = plans[0]
    if isinstance(first, PartitionError):
        raise first
    found = [plan for plan in plans if isinstance(plan, StepPlan)]
    return Forecast(first, tuple(_schedule(plan, num_examples) for plan in found))


def _schedule(plan: StepPlan, num_examples: int | None) -> ScheduleForecast:
    seconds = plan.report.seconds
    throughput = None
    if num_examples is not None and seconds > 0:
        throughput = num_examples / seconds
    return ScheduleForecast(
        plan.pipeline,
        seconds,
        plan.report.bubble,
        memory_by_rank(plan),
        throughput,
    )
