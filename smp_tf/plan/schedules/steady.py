"""One forward, one backward, in a fixed rhythm: warm-up, steady state, the rest.

A rank starts with a number of forwards. From then on each backward is followed by one
forward, and each forward by one backward, even if more of the other kind could run:
what a rank gains by running ahead is lost where others wait in bursts. W fills what
is left over.

A rank with several pieces goes through a group of microbatches with its first piece,
then through the same group with the next one. Two ranks, two pieces each, groups of
two; a number is a microbatch, the second piece is in brackets:

    rank 0 forward   0  1 (0)(1) 2  3 (2)(3)
    rank 0 backward (0)(1) 0  1 (2)(3) 2  3

Such an order is not safe in every pipeline: a rank may wait for the forward that is
next here while another waits for the backward. `portfolio` then passes it over.

Source: Megatron-LM, arXiv 2104.04473, section 2.2; with W, ZB-H1 of Zero Bubble,
arXiv 2401.10241, section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass

from smp_tf.plan.action import Kind, Pipeline
from smp_tf.plan.schedules.limits import Limits, depth_limits
from smp_tf.plan.schedules.progress import Progress

__all__ = ["Steady", "has_virtual_stages", "steady"]


@dataclass(frozen=True)
class Steady:
    """The rhythm as a policy.

    Attributes:
        pipeline: whose stages it orders.
        limits: of what forward stages may keep.
        ahead: for each rank, by how many its forwards may be, and have to be, ahead
            of its backwards.
        forwards: for each rank, its F with repetitions, in order.
        backwards: likewise its B and I.
    """

    pipeline: Pipeline
    limits: Limits
    ahead: tuple[int, ...]
    forwards: tuple[tuple[int, ...], ...]
    backwards: tuple[tuple[int, ...], ...]

    def priority(self, stage: int, mb: int) -> tuple[int, ...]:
        is_weight = self.pipeline.stages[stage].kind is Kind.W
        return (int(is_weight), mb, stage)

    def may_start(self, stage: int, progress: Progress) -> bool:
        given = self.pipeline.stages[stage]
        if given.kind is Kind.W:
            return True
        rank = given.rank
        ahead = self.ahead[rank]
        forwards, backwards = self.forwards[rank], self.backwards[rank]
        done_f, done_b = progress.num_forwards[rank], progress.num_backwards[rank]
        if given.kind is Kind.F:
            if forwards[done_f] != stage or (done_f - done_b >= ahead and backwards):
                return False
            return self.limits.allow(stage, progress)
        return backwards[done_b] == stage and done_f >= min(
            len(forwards), done_b + ahead
        )


def steady(
    pipeline: Pipeline, num_microbatches: int, active_microbatches: int
) -> Steady:
    """Make the policy: how far each rank is ahead, and in which order it goes.

    With one piece a rank is ahead by the number of forward stages to the end, as in
    1F1B. With several it needs a group for each piece but the last, and twice the way
    from there on, for both directions have to be filled.
    """
    ranks = range(pipeline.num_ranks)
    pieces = [0 for _ in ranks]
    last_depth = [1 for _ in ranks]
    depths = depth_limits(pipeline, len(pipeline.stages))
    for index, stage in enumerate(pipeline.stages):
        if pipeline.holders[index]:
            pieces[stage.rank] += 1
            last_depth[stage.rank] = depths[index]
    group = max(1, sum(map(bool, pieces)))
    ahead = tuple(
        min(depth, active_microbatches)
        if count < 2
        else group * (count - 1) + 2 * depth - 1
        for count, depth in zip(pieces, last_depth)
    )

    def sequence(rank: int, kinds: tuple[Kind, ...]) -> tuple[int, ...]:
        own = [
            index
            for index, stage in enumerate(pipeline.stages)
            if stage.rank == rank and stage.kind in kinds
        ]
        found: list[int] = []
        for group_start in range(0, num_microbatches, group):
            size = min(group, num_microbatches - group_start)
            for index in own:
                found += [index] * size
        return tuple(found)

    return Steady(
        pipeline,
        Limits(pipeline, active_microbatches),
        ahead,
        tuple(sequence(rank, (Kind.F,)) for rank in ranks),
        tuple(sequence(rank, (Kind.B, Kind.I)) for rank in ranks),
    )


def has_virtual_stages(pipeline: Pipeline) -> bool:
    """Whether each of several ranks keeps activations of several forward stages."""
    ranks = [
        stage.rank
        for index, stage in enumerate(pipeline.stages)
        if pipeline.holders[index]
    ]
    return len(set(ranks)) > 1 and all(ranks.count(rank) > 1 for rank in set(ranks))
