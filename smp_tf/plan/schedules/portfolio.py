"""The best of several orders, by the clock of the core.

No single list of priorities is best for all pipelines. A schedule therefore names a
few policies, its favourite first, and takes what the simulation says is fastest; all
ranks do the same sums and come to the same order. In a step of few actions `search`
then looks for a shorter one.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from smp_tf.plan.action import Pipeline, Schedule
from smp_tf.plan.schedules.limits import seconds_of_busiest
from smp_tf.plan.schedules.list_scheduling import (
    Order,
    Policy,
    PolicyStuck,
    list_schedule,
)
from smp_tf.plan.schedules.search import search

__all__ = ["best_schedule", "least_seconds"]

_DIGITS = 9
"""Figures that agree in so many digits are equal: they differ by rounding."""

_ACTIONS = 400_000
"""Policies are tried until they have ordered so many actions; one is always."""


def best_schedule(
    pipeline: Pipeline,
    num_microbatches: int,
    policies: Iterable[Policy],
    active_microbatches: int | None = None,
    prefers_short_span: bool = False,
    forwards_first: bool = False,
    worth: float = 0.0,
) -> Schedule:
    """Run the policies and keep the order that ends first.

    Of orders that end at the same time the one that keeps least is had, and of those
    the one whose policy was named first. A policy that gets stuck is passed over.

    Args:
        pipeline: stages and messages with their seconds.
        num_microbatches: at least 1.
        policies: at least one that cannot get stuck. None is tried any more when
            nothing can be better than what was found.
        active_microbatches: what `search` may keep on every rank; if not said, as
            much as the best policy.
        prefers_short_span: of orders that end at the same time, the one with the
            least `Order.span`, even if it keeps more.
        forwards_first: what `search` has to know of `simple`, which keeps them all.
        worth: share of the time by which an order must be shorter to keep more.
    """
    goal = least_seconds(pipeline, num_microbatches)
    work = num_microbatches * seconds_of_busiest(pipeline)
    scale = goal or 1.0

    def rounded(seconds: float) -> float:
        return round(seconds / scale, _DIGITS)

    def merit(order: Order) -> tuple[float, ...]:
        span = rounded(order.span) if prefers_short_span else 0.0
        return (rounded(order.seconds), span, *kept(order))

    def is_better(order: Order, than: Order) -> bool:
        if worth and kept(order) != kept(than):
            less, more = sorted((order, than), key=kept)
            winner = more if more.seconds < less.seconds * (1 - worth) else less
            return winner is order
        return merit(order) < merit(than)

    perfect = (rounded(goal), rounded(work) if prefers_short_span else 0.0)
    actions = num_microbatches * len(pipeline.stages)
    best: Order | None = None
    stuck: PolicyStuck | None = None
    tried = 0
    for policy in policies:
        try:
            order = list_schedule(pipeline, num_microbatches, policy)
        except PolicyStuck as error:
            stuck = error
            continue
        tried += 1
        if best is None or is_better(order, than=best):
            best = order
        if merit(best)[:2] <= perfect or (tried + 1) * actions > _ACTIONS:
            break
    if best is None:
        raise stuck or ValueError("no policy to choose from")
    if rounded(best.seconds) > perfect[0]:
        limits: tuple[int, ...] | None = best.peak_live
        if active_microbatches is not None:
            limits = (active_microbatches,) * pipeline.num_ranks
        shorter = search(
            pipeline,
            num_microbatches,
            None if forwards_first else limits,
            best.seconds,
            forwards_first,
        )
        if shorter is not None:
            best = replace(best, stages=shorter)
    return best.schedule(pipeline)


def kept(order: Order) -> tuple[int, int]:
    """What all ranks keep at their peaks: pieces, microbatches."""
    return sum(order.peak_pieces), sum(order.peak_live)


def least_seconds(pipeline: Pipeline, num_microbatches: int) -> float:
    """A time that no order can beat, limits or not.

    A rank starts when the first microbatch can get there, does its work, and then
    what it did last has to go on to an end. A microbatch needs its own time, too.
    """
    stages = pipeline.stages
    seconds_to = {(m.stage, m.peer): m.seconds for m in pipeline.messages}
    start = [0.0] * len(stages)
    behind = [0.0] * len(stages)
    for index, stage in enumerate(stages):
        for need in stage.needs:
            way = seconds_to.get((need, stage.rank), 0.0)
            start[index] = max(start[index], start[need] + stages[need].seconds + way)
    for index in reversed(range(len(stages))):
        for need in stages[index].needs:
            way = seconds_to.get((need, stages[index].rank), 0.0)
            later = way + stages[index].seconds + behind[index]
            behind[need] = max(behind[need], later)
    least = 0.0
    for rank in range(pipeline.num_ranks):
        own = [index for index, stage in enumerate(stages) if stage.rank == rank]
        if own:
            work = num_microbatches * sum(stages[index].seconds for index in own)
            first, last = min(start[i] for i in own), min(behind[i] for i in own)
            least = max(least, first + work + last)
    ways = (start[i] + stages[i].seconds for i in range(len(stages)))
    return max(least, *ways) if stages else 0.0
