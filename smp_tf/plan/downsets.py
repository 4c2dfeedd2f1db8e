"""The best contiguous partition of all, where there are few enough to look at.

A *downset* contains, with an atom, all atoms before it. A contiguous partition is a
chain of downsets, each partition what one has more than the one before, so the best one
is found by dynamic programming over pairs of downsets (Tarnawski et al., Efficient
Algorithms for Device Placement of DNN Graph Operators, NeurIPS 2020). A chain of n
atoms has n + 1 downsets, two towers have about n * n / 4, independent atoms 2 ** n.
"""

import itertools
from collections.abc import Iterator, Sequence

from smp_tf.plan.problem import Problem

MAX_DOWNSETS = 400
MAX_PAIRS = 40_000
"""Beyond them it would take more than a few seconds."""


class Downsets:
    """All downsets of a problem's atoms, as sets of bits."""

    def __init__(self, problem: Problem, masks: Sequence[int]) -> None:
        self.problem, self.masks = problem, masks
        self.full = (1 << problem.num_atoms) - 1
        weights = (problem.weighted_static, problem.weighted_activations)
        sizes = (problem.static_bytes, problem.activation_bytes)
        self.load_of = {mask: tuple(_sum(w, mask) for w in weights) for mask in masks}
        self.bytes_of = {mask: tuple(_sum(s, mask) for s in sizes) for mask in masks}
        self.tolerance = 1e-12 * max(self.load_of[self.full][0], 1.0)
        self.flows = [
            (1 << flow.source, sum(1 << reader for reader in flow.readers), flow.size)
            for flow in problem.flows
        ]

    def solve(self, upper: float, slack: float) -> tuple[int, ...] | None:
        """The partition of each atom: no fuller than the best possible and the slack
        allow, with the fewest bytes cut, then messages, then the smallest load.

        Args:
            upper: load of the fullest rank in some partition.

        Returns:
            None where there are too many pairs, or none within the memory limit.
        """
        p = self.problem.num_partitions
        within = self._pairs(upper * (1.0 + slack))
        if within is None:
            return None
        lightest = {0: 0.0}
        for k in range(p):
            following: dict[int, float] = {}
            for small, large in within:
                if small in lightest and self._may_end(k, large):
                    load = max(lightest[small], self._load(k, small, large))
                    if load < following.get(large, float("inf")):
                        following[large] = load
            lightest = following
        if lightest.get(self.full, float("inf")) == float("inf"):
            return None
        return self._cheapest(within, lightest[self.full] * (1.0 + slack))

    def _pairs(self, limit: float) -> list[tuple[int, int]] | None:
        """(downset, larger downset) whose difference may be one partition."""
        last = self.problem.num_partitions - 1
        found = []
        for small, large in itertools.permutations(self.masks, 2):
            if (
                small & ~large == 0
                and min(self._load(k, small, large) for k in {0, last})
                <= limit + self.tolerance
            ):
                found.append((small, large))
                if len(found) > MAX_PAIRS:
                    return None
        return found

    def _may_end(self, k: int, large: int) -> bool:
        return (large == self.full) == (k == self.problem.num_partitions - 1)

    def _load(self, k: int, small: int, large: int) -> float:
        count = self.problem.in_flight[k]
        if self.problem.memory_limit is not None:
            bytes_small, bytes_large = self.bytes_of[small], self.bytes_of[large]
            memory = bytes_large[0] - bytes_small[0]
            memory += count * (bytes_large[1] - bytes_small[1])
            if memory > self.problem.memory_limit:
                return float("inf")
        (static, kept), (more, more_kept) = self.load_of[small], self.load_of[large]
        return more - static + count * (more_kept - kept)

    def _cheapest(
        self, within: Sequence[tuple[int, int]], limit: float
    ) -> tuple[int, ...] | None:
        arrivals: dict[int, tuple[int, int]] = {}
        # downset -> (bytes cut, messages, largest load, downsets so far)
        row: dict[int, tuple[int, int, float, tuple[int, ...]]] = {0: (0, 0, 0.0, ())}
        for k in range(self.problem.num_partitions):
            following: dict[int, tuple[int, int, float, tuple[int, ...]]] = {}
            for small, large in within:
                if small not in row or not self._may_end(k, large):
                    continue
                load = self._load(k, small, large)
                if load > limit + self.tolerance:
                    continue
                part = large & ~small
                if part not in arrivals:
                    arrivals[part] = self._arriving(part)
                size, count = arrivals[part]
                cut, messages, most, path = row[small]
                found = (cut + size, messages + count, max(most, load), (*path, large))
                if large not in following or found < following[large]:
                    following[large] = found
            row = following
        return self._spread(row[self.full][3]) if self.full in row else None

    def _arriving(self, part: int) -> tuple[int, int]:
        """Bytes and tensors that this set of atoms gets from the others."""
        sizes = [
            size
            for source, readers, size in self.flows
            if not source & part and readers & part
        ]
        return sum(sizes), len(sizes)

    def _spread(self, path: Sequence[int]) -> tuple[int, ...]:
        return tuple(
            next(k for k, mask in enumerate(path) if mask >> atom & 1)
            for atom in range(self.problem.num_atoms)
        )


def all_downsets(problem: Problem) -> Downsets | None:
    """None where there are more than ``MAX_DOWNSETS``."""
    before = [0] * problem.num_atoms
    for u, v in problem.edges:
        before[v] |= 1 << u
    found, new = {0}, [0]
    while new:
        mask = new.pop()
        for larger in _with_one_more(mask, before):
            if larger not in found:
                found.add(larger)
                new.append(larger)
        if len(found) > MAX_DOWNSETS:
            return None
    return Downsets(problem, sorted(found))


def _with_one_more(mask: int, before: Sequence[int]) -> Iterator[int]:
    for atom, needed in enumerate(before):
        if not mask >> atom & 1 and needed & ~mask == 0:
            yield mask | 1 << atom


def _sum(weights: Sequence[float], mask: int) -> float:
    return sum(weight for atom, weight in enumerate(weights) if mask >> atom & 1)
