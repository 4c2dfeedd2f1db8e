"""``pipeline: "auto"``: the schedule that makes the shortest step in the memory given.

What may be used is ``memory_limit_bytes`` on every rank and ``active_microbatches``. Of
plans that are equally fast the one that needs least memory is taken.
"""

import dataclasses
from collections.abc import Callable, Iterator

from smp_tf.config import Config
from smp_tf.errors import PartitionError
from smp_tf.plan.memory import memory_by_rank
from smp_tf.plan.step_plan import StepPlan

EQUAL = 1.01
"""Estimates of two steps that differ by less say nothing about which is faster."""


def best_plan(config: Config, plan: Callable[[Config], StepPlan]) -> StepPlan:
    """``plan(config)``; with "auto" the best of all that it may mean.

    Raises:
        PartitionError: nothing can be planned; what the last candidate said, which
            needs the least memory.
    """
    if config.pipeline != "auto":
        return plan(config)
    found: list[StepPlan] = []
    error: PartitionError | None = None
    for candidate in candidates(config):
        try:
            found.append(plan(candidate))
        except PartitionError as reason:
            error = reason
    if not found:
        assert error is not None  # there is always a candidate
        raise error
    fastest = min(each.report.seconds for each in found)
    return min(
        (each for each in found if each.report.seconds <= EQUAL * fastest),
        key=lambda each: max(rank.total for rank in memory_by_rank(each)),
    )


def candidates(config: Config) -> Iterator[Config]:
    """What "auto" tries, from the most memory to the least.

    Zero bubble keeps microbatches to fill its bubbles with, as many as it may: all that
    are allowed, those of ZB-H2 (2 p - 1) and ZB-H1 (p). More pieces on a rank are tried
    if the configuration says so.
    """
    most, p = config.active_microbatches, config.partitions
    if most >= config.microbatches:
        yield dataclasses.replace(config, pipeline="simple")
    for active in sorted({most, min(most, 2 * p - 1), min(most, p)}, reverse=True):
        yield dataclasses.replace(
            config, pipeline="zero_bubble", active_microbatches=active
        )
    yield dataclasses.replace(config, pipeline="interleaved")
