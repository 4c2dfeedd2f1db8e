"""interleaved: backward first, whenever one can start. Known as 1F1B.

The name is SageMaker's and means that forwards and backwards alternate. It does
not mean the virtual stages that Megatron calls interleaved.

Three partitions in a chain, four microbatches, every stage one time step:

    step      0    1    2    3    4    5    6    7    8    9   10   11
    rank 0  0F0  0F1  0F2    .    .  5B0  0F3  5B1    .  5B2    .  5B3
    rank 1    .  1F0  1F1    .  4B0  1F2  4B1  1F3  4B2    .  4B3    .
    rank 2    .    .  2F0  3B0  2F1  3B1  2F2  3B2  2F3  3B3    .    .

With p partitions of equal cost and m microbatches the ranks idle for a share of
(p - 1) / (m + p - 1) of the time, here 2 / 6: as much as with `simple`. The gain
is memory: rank i keeps the activations of at most p - i microbatches, not of m.

A forward stage therefore stops when as many of its microbatches are live as there
are forward stages from it to the end: more of them could not shorten the way to
the first backward. Under that rule a chain of equal stages gives exactly the
textbook order, and it carries over to a partition that is visited several times
(tied embeddings) and to pipelines that branch.

Source: PipeDream-Flush, arXiv 2006.09503, section 3.2; Megatron-LM, arXiv
2104.04473, section 2.2.
"""

from __future__ import annotations

from dataclasses import dataclass

from smp_tf.errors import ScheduleError
from smp_tf.plan.action import Kind, Pipeline, Schedule
from smp_tf.plan.schedules.list_scheduling import Progress, list_schedule

__all__ = ["interleaved", "live_limits"]


def interleaved(
    pipeline: Pipeline, num_microbatches: int, active_microbatches: int
) -> Schedule:
    """Order a pipeline backward first, then deepest stage first.

    Args:
        pipeline: stages with their seconds per microbatch.
        num_microbatches: at least 1; may be fewer than ranks.
        active_microbatches: the most microbatches in flight on a rank at once, at
            least 1. Without backward stages nothing is kept and nothing limited.

    Returns:
        Compute actions only.
    """
    if active_microbatches < 1:
        raise ScheduleError(
            "at least one microbatch must be active; "
            f"active_microbatches={active_microbatches}"
        )
    policy = _BackwardFirst(
        pipeline, active_microbatches, live_limits(pipeline, active_microbatches)
    )
    return list_schedule(pipeline, num_microbatches, policy)


def live_limits(pipeline: Pipeline, active_microbatches: int) -> tuple[int, ...]:
    """Return how many microbatches each forward stage may keep.

    That is the number of forward stages on the longest way from the stage to the
    end, itself included, at most active_microbatches. Stages that no backward
    depends on (metrics, say) do not count. 0 for stages that keep nothing.
    """
    stages = pipeline.stages
    for_backward = frozenset[int]().union(
        *(
            pipeline.ancestors[index]
            for index, stage in enumerate(stages)
            if stage.kind.is_backward
        )
    )
    depth = [0] * len(stages)
    for index in reversed(range(len(stages))):
        if stages[index].kind is Kind.F and index in for_backward:
            depth[index] += 1
            for need in stages[index].needs:
                depth[need] = max(depth[need], depth[index])
    return tuple(
        min(active_microbatches, depth[index]) if pipeline.holders[index] else 0
        for index in range(len(stages))
    )


@dataclass(frozen=True)
class _BackwardFirst:
    pipeline: Pipeline
    active_microbatches: int
    limits: tuple[int, ...]

    def priority(self, stage: int, mb: int) -> tuple[int, ...]:
        forward = self.pipeline.stages[stage].kind is Kind.F
        return (int(forward), -stage, mb)

    def may_start(self, stage: int, progress: Progress) -> bool:
        if not self.pipeline.holders[stage]:
            return True
        if progress.live(stage) >= self.limits[stage]:
            return False
        # Two forward stages of one rank may each be within their limit and yet
        # hold different microbatches: the rank as a whole has a limit as well.
        in_flight = progress.in_flight(self.pipeline.stages[stage].rank)
        return (
            progress.started[stage] in in_flight
            or len(in_flight) < self.active_microbatches
        )
