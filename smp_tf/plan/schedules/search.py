"""A search for a shorter order than a policy found, for steps of few actions.

Lists of priorities never let a rank wait for what is worth waiting for, and with few
microbatches one bad choice costs much. So the step is looked at as a job shop: every
stage on every microbatch is an operation of one machine, its rank; what has to come
before what, limits of microbatches in flight too, are edges between operations. As
a stage takes its microbatches in ascending order, a rank may keep n of them exactly if
microbatch k starts there after all that lets go of microbatch k - n.

Branch and bound: of the operations that could go next, the one that could end first
names a rank, and one of those which could start there before that end is taken
(Giffler and Thompson, Operations Research 8, 1960); some shortest order is always
among these. A branch ends when it cannot become shorter than the best known order, or
when the same operations were taken before and ended no later. The search stops after
a fixed number of steps, so that all ranks come to the same order; a few dozen actions
are searched to the end.
"""

from __future__ import annotations

from collections.abc import Sequence

from smp_tf.plan.action import Kind, Pipeline

__all__ = ["search"]

_STEPS = 40_000
"""Operations looked at in all."""

_MOST_OPERATIONS = 250
"""With more of them, not even one order comes out of so many steps."""

_SHARE = 1e-9
"""What is shorter by less is a rounding error."""

Edges = list[list[tuple[int, float]]]


def search(
    pipeline: Pipeline,
    num_microbatches: int,
    limits: Sequence[int] | None,
    seconds: float,
    forwards_first: bool = False,
) -> tuple[tuple[int, ...], ...] | None:
    """Look for an order that takes less than some seconds.

    Args:
        pipeline: stages and messages with their seconds.
        num_microbatches: how often every stage runs.
        limits: for each rank, the most microbatches in flight; None for no limit.
        seconds: of the best order known.
        forwards_first: no rank starts a backward before its last forward.

    Returns:
        For each rank its stages, as in `Order`; None if there is no such order, or
        none was found in the steps allowed.
    """
    if num_microbatches * len(pipeline.stages) > _MOST_OPERATIONS:
        return None
    before = _edges(pipeline, num_microbatches, limits, forwards_first)
    found = _Search(pipeline, num_microbatches, before, seconds)
    found.go(num_microbatches * len(pipeline.stages))
    return found.best


def _edges(
    pipeline: Pipeline,
    num_microbatches: int,
    limits: Sequence[int] | None,
    forwards_first: bool,
) -> Edges:
    """For each operation, mb * stages + stage, what comes before it, and how long."""
    stages, size = pipeline.stages, len(pipeline.stages)
    seconds_to = {(m.stage, m.peer): m.seconds for m in pipeline.messages}
    letting_go: list[set[int]] = [set() for _ in range(pipeline.num_ranks)]
    forwards: list[list[int]] = [[] for _ in range(pipeline.num_ranks)]
    for index, stage in enumerate(stages):
        letting_go[stage.rank].update(pipeline.holders[index])
        if stage.kind is Kind.F:
            forwards[stage.rank].append(index)
    found: Edges = []
    for mb in range(num_microbatches):
        for index, stage in enumerate(stages):
            edges = {
                mb * size + need: seconds_to.get((need, stage.rank), 0.0)
                for need in stage.needs
            }
            same_rank: list[int] = []
            if mb:
                same_rank += [(mb - 1) * size + s for s in (index, *stage.after)]
            if limits is not None and pipeline.holders[index]:
                old = mb - limits[stage.rank]
                if old >= 0:
                    same_rank += [old * size + s for s in letting_go[stage.rank]]
            if forwards_first and stage.kind is not Kind.F:
                last = num_microbatches - 1
                same_rank += [last * size + s for s in forwards[stage.rank]]
            edges.update(dict.fromkeys(same_rank, 0.0))
            found.append(sorted(edges.items()))
    return found


class _Search:
    def __init__(
        self,
        pipeline: Pipeline,
        num_microbatches: int,
        before: Edges,
        seconds: float,
    ) -> None:
        self.before = before
        self.rank = [stage.rank for stage in pipeline.stages] * num_microbatches
        self.seconds = [stage.seconds for stage in pipeline.stages] * num_microbatches
        self.behind: Edges = [[] for _ in before]
        for operation, edges in enumerate(before):
            for other, way in edges:
                self.behind[other].append((operation, way))
        self.sorted = self._sort()
        # How long it takes, at least, from the end of an operation to that of all.
        self.tail = [0.0] * len(before)
        for operation in reversed(self.sorted):
            for later, way in self.behind[operation]:
                least = way + self.seconds[later] + self.tail[later]
                self.tail[operation] = max(self.tail[operation], least)
        self.margin = seconds * _SHARE
        self.goal = seconds - self.margin
        self.best: tuple[tuple[int, ...], ...] | None = None
        self.size = len(pipeline.stages)
        self.end: list[float | None] = [None] * len(before)
        self.free = [0.0] * pipeline.num_ranks
        self.taken: list[int] = []
        self.steps = _STEPS
        self.seen: dict[frozenset[int], list[tuple[float, ...]]] = {}

    def _sort(self) -> list[int]:
        missing = [len(edges) for edges in self.before]
        found = [operation for operation, count in enumerate(missing) if not count]
        for operation in found:
            for later, _ in self.behind[operation]:
                missing[later] -= 1
                if not missing[later]:
                    found.append(later)
        return found

    def go(self, left: int) -> None:
        """Take what is left in all orders that promise to be shorter."""
        if not left:
            self.goal = max(self.free) - self.margin
            self._keep()
            return
        self.steps -= left
        start = self._starts()
        if start is None or self._was_here():
            return
        ready = [
            operation
            for operation in self.sorted
            if self.end[operation] is None
            and all(self.end[other] is not None for other, _ in self.before[operation])
        ]
        first = min(ready, key=lambda o: (start[o] + self.seconds[o], start[o], o))
        rank, until = self.rank[first], start[first] + self.seconds[first]
        rivals = [
            operation
            for operation in ready
            if self.rank[operation] == rank and start[operation] < until - self.margin
        ]
        free = self.free[rank]
        # What takes no time is in nobody's way.
        for operation in sorted(
            rivals if self.seconds[first] else [first],
            key=lambda o: (start[o], -self.tail[o], o),
        ):
            if self.steps < 0:
                return
            self.end[operation] = start[operation] + self.seconds[operation]
            self.free[rank] = start[operation] + self.seconds[operation]
            self.taken.append(operation)
            self.go(left - 1)
            self.taken.pop()
            self.end[operation] = None
            self.free[rank] = free

    def _keep(self) -> None:
        ranks: list[list[int]] = [[] for _ in self.free]
        for operation in self.taken:
            ranks[self.rank[operation]].append(operation % self.size)
        self.best = tuple(map(tuple, ranks))

    def _starts(self) -> list[float] | None:
        """The earliest start of what is left, or None if that is too late."""
        start = [0.0] * len(self.end)
        end, seconds, tail = self.end, self.seconds, self.tail
        left: list[list[int]] = [[] for _ in self.free]
        for operation in self.sorted:
            if end[operation] is not None:
                continue
            rank = self.rank[operation]
            earliest = self.free[rank]
            for other, way in self.before[operation]:
                ended = end[other]
                if ended is None:
                    ended = start[other] + seconds[other]
                if ended + way > earliest:
                    earliest = ended + way
            start[operation] = earliest
            if earliest + seconds[operation] + tail[operation] >= self.goal:
                return None
            left[rank].append(operation)
        for operations in left:
            # One rank alone: what starts late, done at once, and the least behind it.
            operations.sort(key=lambda o: start[o], reverse=True)
            work, least = 0.0, float("inf")
            for operation in operations:
                work += seconds[operation]
                least = min(least, tail[operation])
                if start[operation] + work + least >= self.goal:
                    return None
        return start

    def _was_here(self) -> bool:
        """Whether the same was taken before, and nothing ended later; remember it."""
        end = self.end
        times = [*self.free]
        for operation in sorted(self.taken):
            if any(end[later] is None for later, _ in self.behind[operation]):
                times.append(end[operation] or 0.0)
        known = self.seen.setdefault(frozenset(self.taken), [])
        for other in known:
            if all(a <= b + self.margin for a, b in zip(other, times)):
                return True
        known.append(tuple(times))
        return False
