"""ZB-V: the rhythm of two pieces on every rank, placed like a V.

Three ranks, six microbatches, F, I and W of both pieces one time step each. `f`, `i`
and `w` are of the piece on the way down, capital letters of the one on the way up:

    rank 0  f0 f1 f2 f3 f4 F0 I0 W0 F1 I1 W1 F2 I2 W2 f5 i0 w0 F3 I3 W3 ..
    rank 1   . f0 f1 f2 F0 f3 F1 I0 W0 F2 I1 W1 f4 i0 w0 F3 I2 W2 f5 i1 ..
    rank 2   .  . f0 F0 f1 F1 f2 F2 I0 W0 f3 i0 w0 F3 I1 W1 f4 i1 w1 F4 ..

The last forward of a microbatch is on the rank where it came from, and its backward can
follow at once: rank 0 waits for its first backward no longer than for a forward.
With equal seconds for F, I and W no rank waits from its first action to its last, and
it never keeps more than two pieces for each rank there is, which is the memory of 1F1B.

The order needs as many microbatches in flight as two for each rank, though most of
them with one piece only, and it takes 2 p - 1 microbatches to fill it.

Source: Zero Bubble, arXiv 2401.10241, section 6; the phases are those of
`ScheduleZBVZeroBubble` in torch.distributed.pipelining.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from smp_tf.plan.action import Kind, Pipeline
from smp_tf.plan.schedules.limits import Limits
from smp_tf.plan.schedules.progress import Progress

__all__ = ["Wave", "wave"]


@dataclass(frozen=True)
class Wave:
    """A fixed order as a policy: `order[rank]` are the stages it goes through."""

    limits: Limits
    order: tuple[tuple[int, ...], ...]

    def priority(self, stage: int, mb: int) -> tuple[int, ...]:
        return (stage,)

    def may_start(self, stage: int, progress: Progress) -> bool:
        rank = progress.pipeline.stages[stage].rank
        return self.order[rank][progress.num_started[rank]] == stage and (
            self.limits.allow(stage, progress)
        )


def wave(
    pipeline: Pipeline, num_microbatches: int, active_microbatches: int
) -> Wave | None:
    """Make the policy; None if the stages are not a V of pieces with backwards."""
    ranks = range(pipeline.num_ranks)
    parts: list[dict[str, int]] = [{} for _ in ranks]
    for index, stage in enumerate(pipeline.stages):
        own, name = parts[stage.rank], stage.kind.value.replace("B", "I")
        # Going down a rank is met first, going back the piece on the way up is.
        is_first = (name.lower() if name == "F" else name) not in own
        down = is_first == (name == "F")
        own[name.lower() if down else name] = index
    count = sum(len(own) for own in parts)
    visits = [stage.rank for stage in pipeline.stages if stage.kind is Kind.F]
    is_wave = visits == [*ranks, *reversed(ranks)] and count == len(pipeline.stages)
    if not is_wave or any(not set("fFiI") <= own.keys() for own in parts):
        return None
    order = tuple(
        tuple(
            parts[rank][name]
            for name in _phases(rank, pipeline.num_ranks, num_microbatches)
            if name in parts[rank]
        )
        for rank in ranks
    )
    return Wave(Limits(pipeline, active_microbatches), order)


def _phases(rank: int, num_ranks: int, num_microbatches: int) -> Iterator[str]:
    """Yield the letters of one rank, each num_microbatches times."""
    done = dict.fromkeys("fFiIwW", 0)

    def some(letters: str, times: int = 1) -> Iterator[str]:
        for letter in letters * times:
            # A W goes behind its I, and steps that are too short have gaps.
            most = {"w": done["i"], "W": done["I"]}.get(letter, num_microbatches)
            if done[letter] < most:
                done[letter] += 1
                yield letter

    yield from some("f", 2 * (num_ranks - rank) - 1)
    yield from some("Ff", rank)
    yield from some("FIW", num_ranks - rank)
    while done["F"] < num_microbatches:
        yield from some("fiwFIW")
    yield from some("iI", rank)
    yield from some("iw", num_ranks - rank)
    yield from some("iI", num_microbatches)
    yield from some("W", num_microbatches)
    yield from some("w", num_microbatches)
