"""Orders of the atoms in which a contiguous partition is a row of stretches.

Every contiguous partition is a row of stretches of *some* topological order. The order
of first use is one of them, and rarely the best for a model with branches: a cut
through it may lie across all branches of an Inception block. So several are tried.
"""

import heapq
import random
from collections.abc import Callable, Iterator, Sequence

from smp_tf.plan.problem import Problem

NUM_RANDOM = 12
"""Depth-first orders with branches in random turn. Their seed is fixed: every rank
tries the same ones."""


def orders(problem: Problem) -> Iterator[tuple[int, ...]]:
    """Topological orders of the atoms, without repetition, first use first."""
    after = _after(problem)
    seen = set()
    for order in _all(problem, after):
        if order not in seen:
            seen.add(order)
            yield order


def _all(problem: Problem, after: list[list[int]]) -> Iterator[tuple[int, ...]]:
    n = problem.num_atoms
    yield tuple(range(n))
    if all(len(each) <= 1 for each in after):
        return  # a chain: there is no other
    yield _fewest_alive(problem, after)
    yield _depth_first(after, list(range(n)))
    yield _depth_first(after, [-i for i in range(n)])
    chance = random.Random(0)
    for _ in range(NUM_RANDOM):
        yield _depth_first(after, [chance.random() for _ in range(n)])


def by_partition(chosen: Sequence[int], order: Sequence[int]) -> tuple[int, ...]:
    """The order with the atoms of a partition together; topological if it is
    contiguous."""
    return tuple(sorted(order, key=lambda atom: chosen[atom]))


def _after(problem: Problem) -> list[list[int]]:
    after: list[list[int]] = [[] for _ in range(problem.num_atoms)]
    for u, v in problem.edges:
        after[u].append(v)
    return after


def _in_order(
    after: Sequence[Sequence[int]], rank: Callable[[int, int], tuple[float, ...]]
) -> tuple[int, ...]:
    """Take, of the atoms that are ready, the one with the smallest rank.

    Args:
        rank: (atom, turn at which it became ready) -> what is compared.
    """
    waiting = [0] * len(after)
    for each in after:
        for v in each:
            waiting[v] += 1
    ready = [(rank(u, 0), u) for u in range(len(after)) if not waiting[u]]
    heapq.heapify(ready)
    order = []
    while ready:
        _, u = heapq.heappop(ready)
        order.append(u)
        for v in after[u]:
            waiting[v] -= 1
            if not waiting[v]:
                heapq.heappush(ready, (rank(v, len(order)), v))
    return tuple(order)


def _depth_first(
    after: Sequence[Sequence[int]], priority: Sequence[float]
) -> tuple[int, ...]:
    """Finish a branch before the next: what became ready last goes first."""
    return _in_order(after, lambda atom, turn: (-turn, priority[atom]))


def _fewest_alive(problem: Problem, after: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """At every place, the ready atom after which the fewest bytes are alive.

    A flow is alive between the first and the last of the atoms that touch it.
    """
    n = problem.num_atoms
    touched: list[list[int]] = [[] for _ in range(n)]  # flows of each atom
    untouched = [1 + len(flow.readers) for flow in problem.flows]
    whole = list(untouched)
    for f, flow in enumerate(problem.flows):
        for atom in (flow.source, *flow.readers):
            touched[atom].append(f)
    waiting = [0] * n
    for each in after:
        for v in each:
            waiting[v] += 1

    def growth(atom: int) -> tuple[int, int]:
        change = 0
        for f in touched[atom]:
            size = problem.flows[f].size
            change += size * (untouched[f] == whole[f])  # begins
            change -= size * (untouched[f] == 1)  # ends
        return change, atom

    ready = {u for u in range(n) if not waiting[u]}
    order = []
    while ready:
        u = min(ready, key=growth)
        ready.remove(u)
        order.append(u)
        for f in touched[u]:
            untouched[f] -= 1
        for v in after[u]:
            waiting[v] -= 1
            if not waiting[v]:
                ready.add(v)
    return tuple(order)
