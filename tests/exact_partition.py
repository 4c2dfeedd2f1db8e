"""The best partition there is, from a solver that shares nothing with ours.

A mixed integer program over the definitions of `smp_tf.plan.problem`, for HiGHS
(scipy.optimize.milp). Atom i reaches rank k when its partition is k or more:

    z[i, k] in {0, 1}    i reaches k; z[i, 0] = 1, z[i, P] = 0, z[i, k] >= z[i, k + 1]
    on[i, k]             i is on k: z[i, k] - z[i, k + 1]
    edge u -> v          z[u, k] <= z[v, k]
    no rank is empty     sum over i of on[i, k] >= 1
    load of rank k       sum over i of on[i, k] x (static + in_flight[k] x kept of i)
    flow s -> readers    sent to k >= on[r, k] - on[s, k] for each reader r

Two questions, asked one after the other: how light can the fullest rank be
(`lightest`), and how few bytes can be cut below a given load (`fewest_bytes`). Each
gives the best partition that was found in its time and a proven bound.

A limit on the load bounds where an atom can be at all: what must come before it has to
fit on the ranks up to its own, what must come after it on those from its own. Of a
chain this fixes nearly everything, and loses nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array

from smp_tf.plan.problem import Problem

EPSILON = 1e-6
"""By how much a limit may be exceeded, relative: HiGHS calls what needs less than that
infeasible now and then."""
RELATIVE_GAP = 1e-6  # at which HiGHS stops


@dataclasses.dataclass(frozen=True)
class Found:
    """What the solver knows after its time.

    Attributes:
        value: of the best partition found, infinity when none was.
        bound: proven: no partition has a smaller value.
        chosen: that partition, of each atom.
        is_proven: nothing better exists (or, without a partition, nothing at all).
    """

    value: float
    bound: float
    chosen: tuple[int, ...] | None
    is_proven: bool


def lightest(
    problem: Problem,
    seconds: float = math.inf,
    at_most: float = math.inf,
    *,
    contiguous: bool = True,
) -> Found:
    """The smallest load that the fullest rank can have.

    Args:
        at_most: only partitions up to this load are of interest; the sooner done.
    """
    static, kept = weights(problem)
    limit = at_most * (1 + EPSILON)
    windows = _Windows(problem, static, kept, limit, contiguous)
    if not windows.is_possible:
        return Found(math.inf, limit, None, True)
    model = _Model(problem, windows, contiguous)
    model.require_no_rank_empty()
    bound = quick_bound(problem, contiguous=contiguous)
    fullest = model.column(cost=1.0, low=min(bound, limit), high=limit)
    for rank_load in model.rank_loads(static, kept):
        model.row([*rank_load, (fullest, -1.0)], high=0.0)
    model.limit_memory()
    found = model.solve(seconds, 1.0)
    return dataclasses.replace(found, bound=max(found.bound, min(bound, limit)))


def fewest_bytes(
    problem: Problem,
    max_load: float,
    seconds: float = math.inf,
    *,
    contiguous: bool = True,
    near: Sequence[int] | None = None,
) -> Found:
    """The fewest bytes cut by a partition that loads no rank more than ``max_load``.

    Args:
        near: a partition; only those are looked at, and counted by the bound, that put
            each atom at most one rank from it.
    """
    static, kept = weights(problem)
    limit = max_load * (1 + EPSILON)
    windows = _Windows(problem, static, kept, limit, contiguous)
    if near is not None:
        windows.first = np.maximum(windows.first, np.array(near) - 1)
        windows.last = np.minimum(windows.last, np.array(near) + 1)
    if not windows.is_possible:
        return Found(math.inf, math.inf, None, True)
    model = _Model(problem, windows, contiguous)
    model.require_no_rank_empty()
    for rank_load in model.rank_loads(static, kept):
        model.row([(c, v / limit) for c, v in rank_load], high=1.0)
    model.limit_memory()
    unit = float(max((flow.size for flow in problem.flows), default=1) or 1)
    for (source, readers), size in _merged_flows(problem).items():
        model.count_flow(source, readers, size / unit)
    return model.solve(seconds, unit)


def weights(problem: Problem) -> tuple[np.ndarray, np.ndarray]:
    """Load of each atom on any rank, and that of each microbatch a rank keeps."""
    held = np.array(problem.static_bytes, float)
    kept = np.array(problem.activation_bytes, float)
    seconds = np.array(problem.seconds, float)
    memory = held.sum() + np.mean(problem.in_flight) * kept.sum()
    w = problem.memory_weight
    of_memory = w / memory if memory else w
    of_seconds = (1 - w) / seconds.sum() if seconds.sum() else 1 - w
    return of_memory * held + of_seconds * seconds, of_memory * kept


def quick_bound(problem: Problem, *, contiguous: bool = True) -> float:
    """No partition's fullest rank is lighter: of a smaller limit it is clear at once
    that an atom, or all that comes before or after it, has no place."""
    static, kept = weights(problem)
    low = float(np.max(static + min(problem.in_flight) * kept))
    high = float(static.sum() + max(problem.in_flight) * kept.sum())

    def is_possible(limit: float) -> bool:
        if not _fits(static.sum(), kept.sum(), problem.in_flight, limit):
            return False
        return _Windows(problem, static, kept, limit, contiguous).is_possible

    if is_possible(low):
        return low
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if is_possible(middle) else (middle, high)
    return low


def _fits(static: float, kept: float, in_flight: Iterable[int], limit: float) -> bool:
    """Whether that much fits on those ranks if it could be split at will."""
    room = 0.0
    for count in sorted(in_flight):
        here = min(kept, limit / count)
        kept -= here
        room += limit - here * count
    slack = EPSILON * limit
    return kept <= slack and static <= room + slack


def _merged_flows(problem: Problem) -> dict[tuple[int, tuple[int, ...]], int]:
    """Flows with the same ends as one. A single reader's costs the same both ways."""
    merged: dict[tuple[int, tuple[int, ...]], int] = {}
    for flow in problem.flows:
        source, readers = flow.source, flow.readers
        if len(readers) == 1 and readers[0] < source:
            source, readers = readers[0], (source,)
        key = (source, readers)
        merged[key] = merged.get(key, 0) + flow.size
    return merged


class _Windows:
    """The ranks that each atom can be on: first[i] .. last[i]."""

    def __init__(
        self,
        problem: Problem,
        static: np.ndarray,
        kept: np.ndarray,
        limit: float,
        contiguous: bool,
    ) -> None:
        n, ranks = len(static), len(problem.in_flight)
        self.first, self.last = np.zeros(n, int), np.full(n, ranks - 1)
        self.is_possible = True
        if not contiguous or not math.isfinite(limit):
            return
        before = np.eye(n, dtype=bool)  # before[v, u]: u must not be later than v
        for u, v in sorted(problem.edges, key=lambda edge: edge[1]):
            before[v] |= before[u]

        def fits(some: np.ndarray, low: int, high: int) -> bool:
            in_flight = problem.in_flight[low : high + 1]
            return _fits(static[some].sum(), kept[some].sum(), in_flight, limit)

        changed = True
        while changed:
            changed = False
            for i in range(n):
                first, last = self.first[i], self.last[i]
                while first <= last and not fits(
                    before[i] | (self.last <= first), 0, first
                ):
                    first += 1
                while last >= first and not fits(
                    before[:, i] | (self.first >= last), last, ranks - 1
                ):
                    last -= 1
                if first > last:
                    self.is_possible = False
                    return
                if (first, last) != (self.first[i], self.last[i]):
                    self.first[i], self.last[i], changed = first, last, True


Terms = Sequence[tuple[int, float]]
"""(column, coefficient) pairs."""


class _Model:
    """Columns and rows of a mixed integer program; a column -1 is the constant 1."""

    def __init__(self, problem: Problem, windows: _Windows, contiguous: bool) -> None:
        self.problem, self.ranks = problem, len(problem.in_flight)
        self._costs: list[float] = []
        self._lows: list[float] = []
        self._highs: list[float] = []
        self._rows: list[tuple[Terms, float, float]] = []
        self._reaches: list[dict[int, int]] = []  # of each atom, rank -> column
        for first, last in zip(windows.first, windows.last):
            self._reaches.append(
                {int(k): self.column() for k in range(first + 1, last + 1)}
            )
        self._num_binaries = len(self._costs)
        self._windows = windows
        for i in range(len(self._reaches)):
            for k in range(windows.first[i] + 1, windows.last[i]):
                self.row([*self._reach(i, k), *_minus(self._reach(i, k + 1))], low=0.0)
        for u, v in problem.edges if contiguous else ():
            for k in range(1, self.ranks):
                terms = [*self._reach(v, k), *_minus(self._reach(u, k))]
                if terms:
                    self.row(terms, low=0.0)

    def column(self, cost: float = 0.0, low: float = 0.0, high: float = 1.0) -> int:
        self._costs.append(cost)
        self._lows.append(low)
        self._highs.append(high)
        return len(self._costs) - 1

    def row(self, terms: Terms, low: float = -math.inf, high: float = math.inf) -> None:
        constant = sum(value for column, value in terms if column < 0)
        self._rows.append(
            ([t for t in terms if t[0] >= 0], low - constant, high - constant)
        )

    def _reach(self, i: int, k: int) -> list[tuple[int, float]]:
        if k <= self._windows.first[i]:
            return [(-1, 1.0)]
        return [(self._reaches[i][k], 1.0)] if k <= self._windows.last[i] else []

    def _on(self, i: int, k: int) -> list[tuple[int, float]]:
        return [*self._reach(i, k), *_minus(self._reach(i, k + 1))]

    def _can_be_on(self, i: int, k: int) -> bool:
        return bool(self._windows.first[i] <= k <= self._windows.last[i])

    def require_no_rank_empty(self) -> None:
        for k in range(self.ranks):
            self.row(
                [t for i in range(len(self._reaches)) for t in self._on(i, k)], low=1.0
            )

    def rank_loads(
        self, static: Sequence[float], kept: Sequence[float]
    ) -> Iterable[list[tuple[int, float]]]:
        for k, count in enumerate(self.problem.in_flight):
            yield [
                (column, sign * (static[i] + count * kept[i]))
                for i in range(len(self._reaches))
                if self._can_be_on(i, k)
                for column, sign in self._on(i, k)
            ]

    def limit_memory(self) -> None:
        limit = self.problem.memory_limit
        if limit is None:
            return
        problem = self.problem
        for terms in self.rank_loads(problem.static_bytes, problem.activation_bytes):
            self.row([(column, v / limit) for column, v in terms], high=1.0)

    def count_flow(self, source: int, readers: Sequence[int], cost: float) -> None:
        for k in range(self.ranks):
            those = [reader for reader in readers if self._can_be_on(reader, k)]
            if not those or not cost:
                continue
            sent = self.column(cost)
            for reader in those:
                terms = [*self._on(reader, k), *_minus(self._on(source, k))]
                self.row([*terms, (sent, -1.0)], high=0.0)

    def solve(self, seconds: float, unit: float) -> Found:
        """``unit`` scales the costs back."""
        rows, columns, values = [], [], []
        for at, (terms, _, _) in enumerate(self._rows):
            for column, value in terms:
                rows.append(at)
                columns.append(column)
                values.append(value)
        shape = (len(self._rows), len(self._costs))
        options = {} if math.isinf(seconds) else {"time_limit": float(seconds)}
        result = milp(
            self._costs,
            integrality=np.arange(shape[1]) < self._num_binaries,
            bounds=Bounds(self._lows, self._highs),
            constraints=LinearConstraint(
                csr_array((values, (rows, columns)), shape=shape),
                [low for _, low, _ in self._rows],
                [high for _, _, high in self._rows],
            ),
            options={**options, "mip_rel_gap": RELATIVE_GAP},
        )
        return self._read(result, unit)

    def _read(self, result, unit: float) -> Found:
        is_proven = result.status in (0, 2)  # optimal, infeasible
        bound = -math.inf
        if result.mip_dual_bound is not None:
            bound = float(result.mip_dual_bound) * unit
        if result.x is None:
            return Found(math.inf, math.inf if is_proven else bound, None, is_proven)
        if is_proven:  # without a choice left, HiGHS gives no bound
            bound = max(bound, float(result.fun) * unit * (1 - RELATIVE_GAP))
        chosen = tuple(
            int(first + sum(round(result.x[column]) for column in reach.values()))
            for first, reach in zip(self._windows.first, self._reaches)
        )
        return Found(float(result.fun) * unit, bound, chosen, is_proven)


def _minus(terms: Terms) -> list[tuple[int, float]]:
    return [(column, -value) for column, value in terms]
