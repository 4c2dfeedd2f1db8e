"""interleaved: backward first, whenever one can start. Known as 1F1B.

The name is SageMaker's and means that forwards and backwards alternate. Megatron means
virtual stages when it says interleaved: these come about here when ranks have several
pieces of the model each, see below.

Three partitions in a chain, four microbatches, every stage one time step:

    step      0    1    2    3    4    5    6    7    8    9   10   11
    rank 0  0F0  0F1  0F2    .    .  5B0  0F3  5B1    .  5B2    .  5B3
    rank 1    .  1F0  1F1    .  4B0  1F2  4B1  1F3  4B2    .  4B3    .
    rank 2    .    .  2F0  3B0  2F1  3B1  2F2  3B2  2F3  3B3    .    .

With p partitions of equal cost and m microbatches the ranks idle for a share of
(p - 1) / (m + p - 1) of the time, here 2 / 6: as much as with `simple`. The gain
is memory: rank i keeps the activations of at most p - i microbatches, not of m.

A forward stage therefore stops when so many of its microbatches are live as can be on
the way to its backward and return: see `limits`. Under that rule a chain of equal
stages gives exactly the textbook order, and it carries over to a partition that is
visited several times (tied embeddings) and to pipelines that branch.

Two partitions of two pieces each, in a loop, which is stages 0 and 2 on rank 0:

    step      0    1    2    3    4    5    6    7    8    9
    rank 0  0F0  0F1  2F0  2F1    .  5B0    .  5B1  7B0  7B1
    rank 1    .  1F0  1F1  3F0  4B0  3F1  4B1  6B0  6B1    .

With v pieces a rank the idle share is (p - 1) / (v m + p - 1), here 1 / 5, if p divides
m. It takes 2 p microbatches in flight, with at most v p + p - 1 live pieces on rank 0,
and v times the messages. The order is that of `steady`, which is tried beside the rule
above whenever all ranks have several pieces; the faster one is had.

Source: PipeDream-Flush, arXiv 2006.09503, section 3.2; Megatron-LM, arXiv
2104.04473, section 2.2.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from smp_tf.plan.action import Kind, Pipeline, Schedule
from smp_tf.plan.schedules.limits import (
    Limits,
    check_active,
    depth_limits,
    live_limits,
)
from smp_tf.plan.schedules.list_scheduling import Policy
from smp_tf.plan.schedules.portfolio import best_schedule
from smp_tf.plan.schedules.progress import Progress
from smp_tf.plan.schedules.steady import has_virtual_stages, steady

__all__ = ["BackwardFirst", "interleaved"]

WORTH = 0.05
"""What a step must get shorter by before more activations are kept for it. A message
always takes some time, and would else cost every rank a microbatch more."""


def interleaved(
    pipeline: Pipeline, num_microbatches: int, active_microbatches: int
) -> Schedule:
    """Order a pipeline backward first.

    Args:
        pipeline: stages with their seconds per microbatch.
        num_microbatches: at least 1; may be fewer than ranks.
        active_microbatches: the most microbatches in flight on a rank at once, at
            least 1. Without backward stages nothing is kept and nothing limited.

    Returns:
        Compute actions only.
    """
    check_active(active_microbatches)
    return best_schedule(
        pipeline,
        num_microbatches,
        _policies(pipeline, num_microbatches, active_microbatches),
        worth=WORTH,
    )


def _policies(
    pipeline: Pipeline, num_microbatches: int, active: int
) -> Iterator[Policy]:
    if has_virtual_stages(pipeline):
        yield steady(pipeline, num_microbatches, active)
    little = live_limits(pipeline, active)
    depth = depth_limits(pipeline, active)
    # The depth is a good guess where a microbatch comes back to a busy rank.
    limits = [depth, little, tuple(map(max, little, depth))]
    if any(message.seconds for message in pipeline.messages):
        # What comes late finds its rank busy with something else, once on each hop:
        # the law counts the way, but not these waits.
        twice = depth_limits(pipeline, 2 * active)
        hops = [min(2 * count - 1, active) if count else 0 for count in twice]
        limits.append(tuple(map(max, little, hops)))
    for live in dict.fromkeys(limits):
        yield BackwardFirst(pipeline, Limits(pipeline, active, live))


@dataclass(frozen=True)
class BackwardFirst:
    """Backward first, then the deepest stage."""

    pipeline: Pipeline
    limits: Limits

    def priority(self, stage: int, mb: int) -> tuple[int, ...]:
        forward = self.pipeline.stages[stage].kind is Kind.F
        return (int(forward), -stage, mb)

    def may_start(self, stage: int, progress: Progress) -> bool:
        return self.limits.allow(stage, progress)
