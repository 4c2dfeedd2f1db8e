"""Balance a graph with branches: fill one partition after the other, and skip.

A stretch of an order ends at the first atom that no longer fits, though one of another
branch may. Here an order is only a preference: what does not fit, or waits for what did
not, is left for the next partition. A few fillings are followed at a time (a beam), and
the smallest load with which one of them gets through is found by bisection.
"""

from collections.abc import Sequence

from smp_tf.plan.problem import Problem

BEAM = 6
PRECISION = 2e-3
"""Of the load, relative: far below what a partition may give away for fewer bytes."""


def pack(
    problem: Problem, orders: Sequence[Sequence[int]], upper: float
) -> tuple[int, ...] | None:
    """The partition of each atom, with the lightest fullest rank that was found.

    Args:
        orders: topological, which atoms to take first.
        upper: a load that is known to be possible.

    Returns:
        None where nothing lighter than ``upper`` was found.
    """
    packer = _Packer(problem, orders)
    low, high = max(sum(problem.weighted_static) / problem.num_partitions, 0.0), upper
    best = None
    while high - low > PRECISION * high:
        middle = (low + high) / 2.0
        found = packer.within(middle)
        if found is None:
            low = middle
        else:
            best, high = found, min(middle, max(problem.loads(found)))
    return best


class _Packer:
    """Fills partitions up to a limit."""

    def __init__(self, problem: Problem, orders: Sequence[Sequence[int]]) -> None:
        self.problem, self.orders = problem, orders
        self.before = [0] * problem.num_atoms
        for u, v in problem.edges:
            self.before[v] |= 1 << u

    def within(self, limit: float) -> tuple[int, ...] | None:
        n, p = self.problem.num_atoms, self.problem.num_partitions
        # (atoms placed, load they are on average, downset behind each partition)
        beam: list[tuple[int, float, tuple[int, ...]]] = [(0, 0.0, ())]
        for k in range(p):
            following: dict[int, tuple[int, float, tuple[int, ...]]] = {}
            for placed, done, path in beam:
                for order in self.orders:
                    mask, load = self._filled(placed, order, k, limit)
                    if mask not in following:
                        following[mask] = mask, done + load, (*path, mask)
            beam = sorted(following.values(), key=lambda s: (-s[1], s[0]))[:BEAM]
        full = (1 << n) - 1
        for placed, _, path in beam:
            if placed == full:
                found = [
                    next(k for k, mask in enumerate(path) if mask >> atom & 1)
                    for atom in range(n)
                ]
                return self._without_gaps(found)
        return None

    def _without_gaps(self, chosen: list[int]) -> tuple[int, ...] | None:
        """An empty partition gets an atom of the one before, whose place in the order
        is the last; alone on a later rank it needs no more than it did."""
        members: list[list[int]] = [[] for _ in range(self.problem.num_partitions)]
        for atom in self.orders[0]:
            members[chosen[atom]].append(atom)
        for k in reversed(range(len(members))):
            if members[k]:
                continue
            giver = next((g for g in reversed(range(k)) if members[g]), None)
            if giver is None:
                return None
            atom = members[giver].pop()
            members[k], chosen[atom] = [atom], k
        return tuple(chosen)

    def _filled(
        self, placed: int, order: Sequence[int], k: int, limit: float
    ) -> tuple[int, float]:
        """(atoms placed with partition ``k``, their load on an average rank)."""
        problem, count = self.problem, self.problem.in_flight[k]
        load = average = 0.0
        memory = 0
        for atom in order:
            if placed >> atom & 1 or self.before[atom] & ~placed:
                continue
            more = problem.weighted_static[atom]
            more += count * problem.weighted_activations[atom]
            size = problem.static_bytes[atom] + count * problem.activation_bytes[atom]
            is_within = (
                problem.memory_limit is None or memory + size <= problem.memory_limit
            )
            if load + more > limit or not is_within:
                continue
            load, memory = load + more, memory + size
            average += problem.atom_loads[atom]
            placed |= 1 << atom
        return placed, average
