"""zero_bubble: backwards in two parts, so that ranks fill their waits with one.

I makes the gradients that the rank before waits for. W makes the gradients of weights,
for which nobody waits, and may come later. Three partitions in a chain, four
microbatches, every stage one time step, at most three microbatches in flight:

    step      0    1    2    3    4    5    6    7    8    9   10   11   12   13
    rank 0  0F0  0F1  0F2    .    .  7I0  8W0  0F3  7I1  8W1  7I2  8W2  7I3  8W3
    rank 1    .  1F0  1F1    .  5I0  1F2  5I1  6W0  1F3  5I2  6W1  5I3  6W2  6W3
    rank 2    .    .  2F0  3I0  2F1  3I1  2F2  3I2  4W0  2F3  3I3  4W1  4W2  4W3

A microbatch is in flight until its W is done, so that more `active_microbatches` buy
shorter waits. With p equal partitions, m >= 2 p - 1 microbatches and F, I and W of t
seconds each (half of it for half a partition):

    in flight  partitions                  time of one rank
    p          one piece each     ZB-H1    (3 m + p - 1) t   1F1B: 3 (m + p - 1) t
    2 p - 1    one piece each     ZB-H2     3 m t            nobody waits
    2 p        V of two pieces    ZB-V      3 m t            with the memory of p

The time of one rank is from its first action to its last. From the first action of
all to the last of all each of these takes (3 m + p - 1) t, and no order takes less: the
last rank has nothing to do for the first p - 1 steps.

Partitions are hardly ever equal, and measured seconds of F, I and W are not either.
So several policies are tried:

- a rhythm with W where it fits in: see `steady`, and `wave` for a V
- what others wait for first, then forwards, then W and what nobody waits for
- all I and B first, then forwards, then W

Source: Zero Bubble Pipeline Parallelism, arXiv 2401.10241, sections 3 and 6, table 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from smp_tf.plan.action import Kind, Pipeline, Schedule
from smp_tf.plan.schedules.limits import Limits, check_active
from smp_tf.plan.schedules.list_scheduling import Policy
from smp_tf.plan.schedules.portfolio import best_schedule
from smp_tf.plan.schedules.progress import Progress
from smp_tf.plan.schedules.steady import steady
from smp_tf.plan.schedules.wave import wave

__all__ = ["zero_bubble"]


def zero_bubble(
    pipeline: Pipeline, num_microbatches: int, active_microbatches: int
) -> Schedule:
    """Order a pipeline so that what nobody waits for fills the gaps.

    Args:
        pipeline: backward stages may be whole, B, or split, I and W.
        num_microbatches: at least 1; may be fewer than ranks.
        active_microbatches: the most microbatches in flight on a rank at once, at
            least 1. A pending W counts.

    Returns:
        Compute actions only.
    """
    check_active(active_microbatches)
    return best_schedule(
        pipeline,
        num_microbatches,
        _policies(pipeline, num_microbatches, active_microbatches),
        active_microbatches,
        prefers_short_span=True,
    )


def _policies(
    pipeline: Pipeline, num_microbatches: int, active: int
) -> Iterator[Policy]:
    in_waves = wave(pipeline, num_microbatches, active)
    if in_waves is not None:
        yield in_waves
    yield steady(pipeline, num_microbatches, active)
    limits = Limits(pipeline, active)
    backwards = [
        index
        for index, stage in enumerate(pipeline.stages)
        if stage.kind in (Kind.B, Kind.I)
    ]
    yield _UrgentFirst(pipeline, limits, frozenset(_awaited(pipeline)))
    yield _UrgentFirst(pipeline, limits, frozenset(backwards))


def _awaited(pipeline: Pipeline) -> set[int]:
    """Stages on which a stage of another rank depends."""
    stages = pipeline.stages
    found: set[int] = set()
    for index in reversed(range(len(stages))):
        for need in stages[index].needs:
            if index in found or stages[need].rank != stages[index].rank:
                found.add(need)
    return found


@dataclass(frozen=True)
class _UrgentFirst:
    """Urgent backwards, then forwards, then the rest."""

    pipeline: Pipeline
    limits: Limits
    urgent: frozenset[int]

    def priority(self, stage: int, mb: int) -> tuple[int, ...]:
        if self.pipeline.stages[stage].kind is Kind.F:
            return (1, -stage, mb)
        if stage in self.urgent:
            return (0, -stage, mb)
        return (2, mb, stage)

    def may_start(self, stage: int, progress: Progress) -> bool:
        return self.limits.allow(stage, progress)
