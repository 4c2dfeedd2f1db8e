"""The best row of stretches of one order of the atoms: exact dynamic programs.

Partition k gets the places bounds[k] .. bounds[k + 1] - 1 of the order; none is empty.
"""

import bisect
import functools
import itertools
from collections.abc import Iterator, Sequence

from smp_tf.plan.problem import Problem

PRECISION = 1e-9
"""Of the best balance, relative."""


class Stretches:
    """Sums over stretches of one order."""

    def __init__(self, problem: Problem, order: Sequence[int]) -> None:
        self.problem, self.order = problem, order
        self.static, self.activations, self.bytes, self.kept = (
            [0.0, *itertools.accumulate(weights[atom] for atom in order)]
            for weights in (
                problem.weighted_static,
                problem.weighted_activations,
                problem.static_bytes,
                problem.activation_bytes,
            )
        )
        self.tolerance = 1e-12 * max(self.static[-1], 1.0)

    def load(self, k: int, start: int, end: int) -> float:
        """Of partition ``k`` with places start .. end - 1; infinite above the memory
        limit."""
        problem = self.problem
        count = problem.in_flight[k]
        if problem.memory_limit is not None:
            memory = self.bytes[end] - self.bytes[start]
            memory += count * (self.kept[end] - self.kept[start])
            if memory > problem.memory_limit:
                return float("inf")
        found = self.static[end] - self.static[start]
        return found + count * (self.activations[end] - self.activations[start])

    @functools.cached_property
    def best_bottleneck(self) -> float:
        """The smallest load of the fullest partition, to ``PRECISION``; infinite where
        nothing is within the memory limit.

        Whether a limit can be kept is seen by filling one partition after the other as
        far as it allows (loads only grow with a stretch), and the limit by bisection.
        """
        bounds = self._latest(float("inf"))
        if bounds is None:
            return float("inf")
        low, high = 0.0, self._heaviest(bounds)
        while high - low > PRECISION * high:
            middle = (low + high) / 2.0
            bounds = self._latest(middle)
            if bounds is None:
                low = middle
            else:
                high = self._heaviest(bounds)
        return high

    def _heaviest(self, bounds: Sequence[int]) -> float:
        return max(
            self.load(k, start, end)
            for k, (start, end) in enumerate(itertools.pairwise(bounds))
        )

    def cheapest(self, limit: float) -> tuple[int, ...] | None:
        """The partition of each atom, every load <= limit, with the fewest bytes cut;
        then the fewest messages, the smallest load, the earliest last bound. None where
        the limit is too small."""
        n, p = len(self.order), self.problem.num_partitions
        ranges = self._reachable(limit) if limit < float("inf") else None
        if ranges is None:
            return None
        place = {atom: i for i, atom in enumerate(self.order)}
        arrivals = _Arrivals(self.problem, self.order, place)
        widest = min(range(p), key=lambda k: self.problem.in_flight[k])

        @functools.cache  # the same for every partition
        def stretches_to(end: int) -> list[tuple[int, int, int]]:
            return list(
                itertools.takewhile(
                    lambda found: self.load(widest, found[0], end)
                    <= limit + self.tolerance,
                    arrivals.before(end),
                )
            )

        problem, static, activations = self.problem, self.static, self.activations
        most_allowed = limit + self.tolerance
        # bound -> (bytes cut, messages, largest load)
        row: dict[int, tuple[int, int, float]] = {0: (0, 0, 0.0)}
        origins: list[dict[int, int]] = []  # of each partition: bound -> the one before
        for k in range(p):
            following: dict[int, tuple[int, int, float]] = {}
            origin: dict[int, int] = {}
            # Written out: millions of stretches are gone through.
            in_flight, is_limited = (
                problem.in_flight[k],
                problem.memory_limit is not None,
            )
            for i in ranges[k + 1]:
                for j, size, count in stretches_to(i):
                    load = static[i] - static[j]
                    load += in_flight * (activations[i] - activations[j])
                    if load > most_allowed or j < ranges[k][0]:
                        break
                    if is_limited and self.load(k, j, i) > most_allowed:
                        break
                    if j in row:
                        cut, messages, most = row[j]
                        found = (cut + size, messages + count, max(most, load))
                        if i not in following or found <= following[i]:
                            following[i], origin[i] = found, j
            row = following
            origins.append(origin)
        if n not in row:
            return None
        bounds = [n]
        for origin in reversed(origins):
            bounds.append(origin[bounds[-1]])
        return _spread(self.order, bounds[::-1])

    def borders(self, limit: float) -> list[list[int]] | None:
        """For each border between partitions, the atoms before it as a set of bits, at
        all places where it can be."""
        ranges = self._reachable(limit) if limit < float("inf") else None
        if ranges is None:
            return None
        before = [0, *itertools.accumulate(1 << atom for atom in self.order)]
        return [[before[i] for i in places] for places in ranges[1:-1]]

    def _reachable(self, limit: float) -> list[range] | None:
        """Where each bound can be so that what is before it and behind it fits."""
        n, p = len(self.order), self.problem.num_partitions
        limit += self.tolerance
        latest = self._filled(limit)
        if latest is None:
            return None
        earliest = [n]
        for k in reversed(range(p)):
            end = earliest[-1]
            room = range(k, end)
            too_far = bisect.bisect_left(
                room, True, key=lambda j: self.load(k, j, end) <= limit
            )
            earliest.append(k + too_far)
        earliest.reverse()
        return [
            range(low, min(high, n - (p - k)) + 1)
            for k, (low, high) in enumerate(zip(earliest, latest, strict=True))
        ]

    def _filled(self, limit: float) -> list[int] | None:
        """Bounds with as much in each partition as the limit allows, from the front.
        One may be empty: what comes next is too much for it, but not for a later rank,
        which has fewer microbatches in flight."""
        n, bounds = len(self.order), [0]
        for k in range(self.problem.num_partitions):
            start = bounds[-1]
            fits = bisect.bisect_left(
                range(start + 1, n + 1),
                True,
                key=lambda i: self.load(k, start, i) > limit,
            )
            bounds.append(start + fits)
        return bounds if bounds[-1] == n else None

    def _latest(self, limit: float) -> list[int] | None:
        """The same, none of them empty: those before give one atom each. Alone on a
        later rank it needs no more than it did."""
        bounds = self._filled(limit)
        if bounds is None:
            return None
        for k in reversed(range(1, len(bounds) - 1)):
            bounds[k] = min(bounds[k], bounds[k + 1] - 1)
        return bounds if bounds[1] > 0 else None


class _Arrivals:
    """Bytes that a stretch gets from the others."""

    def __init__(
        self, problem: Problem, order: Sequence[int], place: dict[int, int]
    ) -> None:
        self.flows = problem.flows
        self.made: list[list[int]] = [[] for _ in order]  # flows, by place
        self.read: list[list[int]] = [[] for _ in order]
        for f, flow in enumerate(problem.flows):
            self.made[place[flow.source]].append(f)
            for reader in flow.readers:
                self.read[place[reader]].append(f)

    def before(self, end: int) -> Iterator[tuple[int, int, int]]:
        """(start, bytes, tensors) that places start .. end - 1 get, for the starts from
        ``end - 1`` down."""
        inside: set[int] = set()  # flows made there
        arriving: set[int] = set()
        size = 0
        for start in reversed(range(end)):
            for f in self.made[start]:
                inside.add(f)
                if f in arriving:
                    arriving.remove(f)
                    size -= self.flows[f].size
            for f in self.read[start]:
                if f not in inside and f not in arriving:
                    arriving.add(f)
                    size += self.flows[f].size
            yield start, size, len(arriving)


def _spread(order: Sequence[int], bounds: Sequence[int]) -> tuple[int, ...]:
    """The partition of each atom."""
    chosen = [0] * len(order)
    for k, (start, end) in enumerate(itertools.pairwise(bounds)):
        for atom in order[start:end]:
            chosen[atom] = k
    return tuple(chosen)
