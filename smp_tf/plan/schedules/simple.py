"""simple: all forwards, then all backwards. Known as GPipe.

Three partitions in a chain, four microbatches, every stage one time step:

    step      0    1    2    3    4    5    6    7    8    9   10   11
    rank 0  0F0  0F1  0F2  0F3    .    .    .    .  5B0  5B1  5B2  5B3
    rank 1    .  1F0  1F1  1F2  1F3    .    .  4B0  4B1  4B2  4B3    .
    rank 2    .    .  2F0  2F1  2F2  2F3  3B0  3B1  3B2  3B3    .    .

With p partitions of equal cost and m microbatches the ranks idle for a share of
(p - 1) / (m + p - 1) of the time, here 2 / 6. Every rank keeps the activations of
all m microbatches.

Source: GPipe, arXiv 1811.06965, section 2.3.
"""

from __future__ import annotations

from dataclasses import dataclass

from smp_tf.plan.action import Kind, Pipeline, Schedule
from smp_tf.plan.schedules.portfolio import best_schedule
from smp_tf.plan.schedules.progress import Progress

__all__ = ["simple"]


def simple(pipeline: Pipeline, num_microbatches: int) -> Schedule:
    """Order a pipeline so that no rank starts a backward before its last forward.

    The oldest microbatch goes first, in both halves. There is no limit of active
    microbatches: this schedule is the one that keeps them all.

    Args:
        pipeline: stages with their seconds per microbatch.
        num_microbatches: at least 1; may be fewer than ranks.

    Returns:
        Compute actions only.
    """
    return best_schedule(
        pipeline,
        num_microbatches,
        (_ForwardThenBackward(pipeline, by_stage) for by_stage in (False, True)),
        forwards_first=True,
    )


@dataclass(frozen=True)
class _ForwardThenBackward:
    pipeline: Pipeline
    by_stage: bool

    def priority(self, stage: int, mb: int) -> tuple[int, ...]:
        return (stage, mb) if self.by_stage else (mb, stage)

    def may_start(self, stage: int, progress: Progress) -> bool:
        stages = self.pipeline.stages
        return stages[stage].kind is Kind.F or all(
            progress.started[other] == progress.num_microbatches
            for other in progress.by_rank[stages[stage].rank]
            if stages[other].kind is Kind.F
        )
