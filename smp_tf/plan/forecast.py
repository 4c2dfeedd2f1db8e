"""What a plan means before anything is launched: memory, messages, time by schedule."""

import dataclasses
from collections.abc import Sequence

from smp_tf.errors import PartitionError
from smp_tf.plan.memory import RankMemory, memory_by_rank
from smp_tf.plan.segment import Cut
from smp_tf.plan.step_plan import StepPlan


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
    def bytes_per_step(self) -> int:
        """That cross ranks in one step."""
        each = sum(cut.spec.num_bytes for cut in self.cuts)
        return each * self.plan.num_microbatches

    def fits(self, limit_bytes: int) -> bool:
        """Whether every rank needs at most so much."""
        return self.schedules[0].worst_bytes <= limit_bytes

    def __repr__(self) -> str:
        """One line; ``smp.forecast_table`` has the rest."""
        first, plan = self.schedules[0], self.plan
        return (
            f"partitions={plan.num_partitions} microbatches={plan.num_microbatches}"
            f" pipeline={first.pipeline} worst_rank_bytes={first.worst_bytes}"
            f" bytes_per_step={self.bytes_per_step} bubble={first.bubble:.3f}"
        )


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
