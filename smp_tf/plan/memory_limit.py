"""Keep a plan within ``memory_limit_bytes``, or say how small the limit could be."""

import dataclasses
from collections.abc import Callable

from smp_tf.errors import PartitionError
from smp_tf.plan.memory import memory_by_rank
from smp_tf.plan.partition import emptiest, partition_problem
from smp_tf.plan.problem import Problem
from smp_tf.plan.step_plan import StepPlan

TRIES = 4


def plan_within(
    limit: int | None,
    problem: Problem,
    contiguous: bool,
    planned: Callable[[tuple[int, ...]], StepPlan],
) -> StepPlan:
    """The best plan in which no rank needs more than ``limit`` bytes.

    The partitioner counts what is kept between functions; the plan's own memory also
    what its schedule and its functions hold for a moment. So the limit of the
    partitioner is made smaller, in proportion, until the plan is within the user's.

    Args:
        planned: partition of each atom -> the plan with it.

    Raises:
        PartitionError: none was found; names the smallest limit that could be kept.
    """
    plan = planned(partition_problem(problem, contiguous))
    if limit is None:
        return plan
    smallest = _fullest(plan)
    for _ in range(TRIES):
        worst = _fullest(plan)
        smallest = min(smallest, worst)
        if worst <= limit:
            return plan
        estimate = max(problem.memory(plan.partition_of_atom))
        tighter = round(estimate * limit / worst)
        if tighter < 1:
            break
        try:
            chosen = partition_problem(
                dataclasses.replace(problem, memory_limit=tighter), contiguous
            )
        except PartitionError:
            break
        plan = planned(chosen)
    plan = planned(emptiest(problem, contiguous))
    if _fullest(plan) <= limit:
        return plan
    raise _refusal(limit, min(smallest, _fullest(plan)), plan)


def require_within(limit: int | None, plan: StepPlan) -> None:
    """For a partition that is given and not to be changed.

    Raises:
        PartitionError: a rank needs more.
    """
    if limit is not None and _fullest(plan) > limit:
        raise _refusal(limit, _fullest(plan), plan)


def _fullest(plan: StepPlan) -> int:
    return max(each.total for each in memory_by_rank(plan))


def _refusal(limit: int, smallest: int, plan: StepPlan) -> PartitionError:
    return PartitionError(
        f"no rank may need more than memory_limit_bytes: memory_limit_bytes={limit}"
        f" partitions={plan.num_partitions} microbatches={plan.num_microbatches}"
        f" pipeline={plan.pipeline}; the smallest that can be kept is {smallest}; use"
        " more partitions, smaller microbatches, fewer active_microbatches, or that"
        " limit"
    )
