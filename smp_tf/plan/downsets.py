"""Contiguous partitions as chains of downsets: the best of all, or of all nearby.

A *downset* contains, with an atom, all atoms before it. A contiguous partition is a
chain of downsets, each partition what one has more than the one before, so the best one
is found by dynamic programming over pairs of downsets (Tarnawski et al., Efficient
Algorithms for Device Placement of DNN Graph Operators, NeurIPS 2020). A chain of n
atoms has n + 1 downsets, two towers have about n * n / 4, independent atoms 2 ** n. Of
a graph that has too many, those are tried that are a few atoms away from the borders of
a partition that is good already: moves of several atoms at several borders at once.
"""

from collections.abc import Iterator, Sequence

from smp_tf.plan.problem import Problem

MAX_DOWNSETS = 400
MAX_PAIRS = 40_000
"""Beyond them it would take more than a few seconds."""

NEAR_MOVES = 6
"""Atoms by which a downset may differ from the border that it is near to."""

NEAR_WIDTH = 100
"""Downsets near a border, at most."""


class Borders:
    """Choices for each border between partitions.

    Attributes:
        choices: [p + 1] downsets, as sets of bits: nothing before the first partition,
            all atoms behind the last.
    """

    def __init__(self, problem: Problem, choices: Sequence[Sequence[int]]) -> None:
        self.problem = problem
        self.full = (1 << problem.num_atoms) - 1
        self.choices = [[0], *choices, [self.full]]
        masks = set().union(*self.choices)
        weights = (problem.weighted_static, problem.weighted_activations)
        sizes = (problem.static_bytes, problem.activation_bytes)
        self.load_of = {m: [_sum(each, m) for each in weights] for m in masks}
        self.bytes_of = {m: [_sum(each, m) for each in sizes] for m in masks}
        self.tolerance = 1e-12 * max(self.load_of[self.full][0], 1.0)
        self.read: list[list[int]] = [[] for _ in problem.seconds]  # flows of an atom
        for f, flow in enumerate(problem.flows):
            for reader in flow.readers:
                self.read[reader].append(f)
        self.arrivals: dict[int, tuple[int, int]] = {}

    def lightest(self, upper: float) -> tuple[int, ...] | None:
        """The partition of each atom with the lightest fullest rank; of those, with the
        fewest bytes cut.

        Args:
            upper: load of the fullest rank in some partition.

        Returns:
            None where there are too many pairs, or none within the memory limit.
        """
        pairs = self._pairs(upper)
        if pairs is None:
            return None
        lightest = {0: 0.0}
        for k, within in enumerate(pairs):
            following: dict[int, float] = {}
            for small, large in within:
                if small in lightest:
                    load = max(lightest[small], self._load(k, small, large))
                    if load < following.get(large, float("inf")):
                        following[large] = load
            lightest = following
        best = lightest.get(self.full, float("inf"))
        return self._cheapest(pairs, best) if best < float("inf") else None

    def cheapest(self, limit: float) -> tuple[int, ...] | None:
        """No load above the limit, with the fewest bytes cut, then messages, then the
        smallest load; None as in ``lightest``."""
        pairs = self._pairs(limit)
        return self._cheapest(pairs, limit) if pairs is not None else None

    def _pairs(self, limit: float) -> list[list[tuple[int, int]]] | None:
        """For each partition, (downset, larger downset) of which it may be the
        difference."""
        lightest = min(
            range(self.problem.num_partitions), key=self.problem.in_flight.__getitem__
        )
        known: dict[tuple[int, int], list[tuple[int, int]]] = {}
        found = []
        for before, behind in zip(self.choices, self.choices[1:]):
            key = id(before), id(behind)
            if key not in known:
                known[key] = [
                    (small, large)
                    for small in before
                    for large in behind
                    if small & ~large == 0
                    and small != large
                    and self._load(lightest, small, large) <= limit + self.tolerance
                ]
                if sum(map(len, known.values())) > MAX_PAIRS:
                    return None
            found.append(known[key])
        return found

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
        self, pairs: Sequence[Sequence[tuple[int, int]]], limit: float
    ) -> tuple[int, ...] | None:
        # downset -> (bytes cut, messages, largest load, downsets so far)
        row: dict[int, tuple[int, int, float, tuple[int, ...]]] = {0: (0, 0, 0.0, ())}
        for k, within in enumerate(pairs):
            following: dict[int, tuple[int, int, float, tuple[int, ...]]] = {}
            for small, large in within:
                load = self._load(k, small, large)
                if small not in row or load > limit + self.tolerance:
                    continue
                size, count = self._arriving(large & ~small)
                cut, messages, most, path = row[small]
                found = (cut + size, messages + count, max(most, load), (*path, large))
                if large not in following or found < following[large]:
                    following[large] = found
            row = following
        return self._spread(row[self.full][3]) if self.full in row else None

    def _arriving(self, part: int) -> tuple[int, int]:
        """Bytes and tensors that this set of atoms gets from the others."""
        if part not in self.arrivals:
            flows = {f for atom in _atoms_of(part) for f in self.read[atom]}
            sizes = [
                self.problem.flows[f].size
                for f in flows
                if not part >> self.problem.flows[f].source & 1
            ]
            self.arrivals[part] = sum(sizes), len(sizes)
        return self.arrivals[part]

    def _spread(self, path: Sequence[int]) -> tuple[int, ...]:
        return tuple(
            next(k for k, mask in enumerate(path) if mask >> atom & 1)
            for atom in range(self.problem.num_atoms)
        )


def all_borders(problem: Problem) -> Borders | None:
    """Every downset at every border; None where there are more than
    ``MAX_DOWNSETS``."""
    before = _before(problem)
    found, new = {0}, [0]
    while new:
        mask = new.pop()
        for atom in _addable(mask, before):
            larger = mask | 1 << atom
            if larger not in found:
                found.add(larger)
                new.append(larger)
        if len(found) > MAX_DOWNSETS:
            return None
    inner = sorted(found - {0, (1 << problem.num_atoms) - 1})
    return Borders(problem, [inner] * (problem.num_partitions - 1))


def near_borders(
    problem: Problem,
    chosen: Sequence[int],
    more: Sequence[Sequence[int]] = (),
    by_load: bool = False,
) -> Borders:
    """At every border of a contiguous partition, downsets that are near to it.

    Args:
        more: for each border, downsets that are not.
        by_load: keep those that split the atoms most like the border does, instead of
            those that the fewest bytes cross.
    """
    p = problem.num_partitions
    near = _Near(problem, min(NEAR_WIDTH, int((MAX_PAIRS / p) ** 0.5)), by_load)
    return Borders(
        problem,
        [
            near.downsets(
                sum(1 << a for a, q in enumerate(chosen) if q < border),
                more[border - 1] if more else (),
            )
            for border in range(1, p)
        ],
    )


class _Near:
    """Downsets a few atoms away from one."""

    def __init__(self, problem: Problem, width: int, by_load: bool) -> None:
        self.problem, self.width, self.by_load = problem, width, by_load
        self.before = _before(problem)
        self.after = [0] * problem.num_atoms
        for u, v in problem.edges:
            self.after[u] |= 1 << v
        self.touched: list[tuple[int, int]] = []  # (atoms of a flow, its bytes)
        self.flows: list[list[tuple[int, int]]] = [[] for _ in problem.seconds]
        for flow in problem.flows:
            atoms = (flow.source, *flow.readers)
            self.touched.append((sum(1 << atom for atom in atoms), flow.size))
            for atom in atoms:
                self.flows[atom].append(self.touched[-1])

    def downsets(self, border: int, more: Sequence[int]) -> list[int]:
        """The border first."""
        score: dict[int, float] = {border: self._crossing(border)}
        ring = [border]
        for _ in range(NEAR_MOVES):
            new: dict[int, float] = {}
            for mask in ring:
                for atom in (*_addable(mask, self.before), *self._removable(mask)):
                    other = mask ^ 1 << atom
                    if other not in score and other not in new:
                        new[other] = score[mask] + self._change(mask, atom)
            ring = sorted(new, key=lambda mask: (new[mask], mask))[: self.width]
            score.update((mask, new[mask]) for mask in ring)
        score.update((mask, self._crossing(mask)) for mask in more if mask not in score)
        for mask in (0, (1 << self.problem.num_atoms) - 1, border):
            score.pop(mask, None)
        if self.by_load:
            here = _sum(self.problem.atom_loads, border)
            score = {m: abs(_sum(self.problem.atom_loads, m) - here) for m in score}
        best = sorted(score, key=lambda mask: (score[mask], mask))
        return [border, *best[: self.width - 1]]

    def _crossing(self, mask: int) -> int:
        return sum(size for touched, size in self.touched if _is_split(touched, mask))

    def _removable(self, mask: int) -> Iterator[int]:
        for atom in _atoms_of(mask):
            if not self.after[atom] & mask:
                yield atom

    def _change(self, mask: int, atom: int) -> int:
        """Bytes that cross when the atom changes sides, less those that do now."""
        other = mask ^ 1 << atom
        return sum(
            size * (_is_split(touched, other) - _is_split(touched, mask))
            for touched, size in self.flows[atom]
        )


def _is_split(touched: int, mask: int) -> bool:
    return touched & mask not in (0, touched)


def _before(problem: Problem) -> list[int]:
    before = [0] * problem.num_atoms
    for u, v in problem.edges:
        before[v] |= 1 << u
    return before


def _addable(mask: int, before: Sequence[int]) -> Iterator[int]:
    for atom, needed in enumerate(before):
        if not mask >> atom & 1 and needed & ~mask == 0:
            yield atom


def _atoms_of(mask: int) -> Iterator[int]:
    while mask:
        lowest = mask & -mask
        yield lowest.bit_length() - 1
        mask ^= lowest


def _sum(weights: Sequence[float], mask: int) -> float:
    return sum(weights[atom] for atom in _atoms_of(mask))
