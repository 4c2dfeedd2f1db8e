"""Schedules by name: pure functions from a pipeline to an order of actions."""

from __future__ import annotations

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Pipeline, Schedule
from smp_tf.plan.schedules.interleaved import interleaved
from smp_tf.plan.schedules.simple import simple
from smp_tf.plan.schedules.zero_bubble import zero_bubble

__all__ = ["NAMES", "build", "interleaved", "simple", "zero_bubble"]

NAMES = ("interleaved", "simple", "zero_bubble")
"""Values of the configuration key `pipeline` that can be built."""


def build(
    name: str,
    pipeline: Pipeline,
    num_microbatches: int,
    active_microbatches: int,
) -> Schedule:
    """Build the schedule of this name, with compute actions only.

    Args:
        name: one of NAMES.
        pipeline: stages with their seconds per microbatch.
        num_microbatches: at least 1.
        active_microbatches: the most in flight on a rank; no limit for `simple`.

    Raises:
        ScheduleError: no schedule has this name, or a number is below 1.
    """
    if name == "interleaved":
        return interleaved(pipeline, num_microbatches, active_microbatches)
    if name == "simple":
        return simple(pipeline, num_microbatches)
    if name == "zero_bubble":
        return zero_bubble(pipeline, num_microbatches, active_microbatches)
    raise ScheduleError(f"no such schedule; pipeline={name!r}; use one of {NAMES}")
