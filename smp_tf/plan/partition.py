"""Assign atoms to partitions: the fullest as light as can be, then few bytes cut."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence

from smp_tf.errors import PartitionError
from smp_tf.plan.atoms import Atoms
from smp_tf.plan.downsets import all_borders, near_borders
from smp_tf.plan.orders import by_partition, orders
from smp_tf.plan.packing import pack
from smp_tf.plan.problem import Problem
from smp_tf.plan.refine import refine
from smp_tf.plan.stretches import PRECISION, Stretches

SLACK = 0.02
"""How much worse than the best balance a partition may be to cut fewer bytes: an
imbalance of 2 % costs 2 % of the step, about what sending an activation costs."""

MAX_TRIED = 20_000
"""Partitions of so few are tried one by one, where they need not be contiguous."""

MAX_ROUNDS = 6
"""Of looking for something better near to what was found."""

MOVES = 200_000
"""Atoms x ranks that are gone through to try single atoms on other ranks."""

REFINED = 3
"""Of the cheapest partitions of all orders, how many are refined."""

_Chosen = tuple[int, ...]


def partition_problem(problem: Problem, contiguous: bool = True) -> _Chosen:
    """Spread atoms over partitions, none of which is empty.

    The fullest partition is as light as possible (within ``SLACK``); among such
    partitions the one that cuts the fewest bytes is taken, then the one with the fewest
    messages. Exact for a chain and for small graphs. Else several orders of the atoms
    are solved exactly and the best are refined, which is near that.

    Args:
        contiguous: no tensor of the forward goes to an earlier rank, but for layers
            that are used again.

    Returns:
        The partition of each atom.

    Raises:
        PartitionError: more partitions than atoms, or nothing within the memory limit;
            names the smallest limit that could be kept.
    """
    _require_enough_atoms(problem)
    if not contiguous and problem.num_partitions**problem.num_atoms <= MAX_TRIED:
        return _best_of_all(problem)
    solved = [Stretches(problem, order) for order in orders(problem)]
    balanced = _best_balanced(problem, solved, contiguous)
    if balanced is None:
        raise _over_limit(problem, contiguous)
    limit = max(problem.loads(balanced)) * (1.0 + SLACK)
    every = all_borders(problem) if contiguous else None
    exact = every.cheapest(limit) if every else None
    if exact is not None:
        return exact
    found = {each.cheapest(limit) for each in solved} | {balanced}
    starts = sorted((each for each in found if each is not None), key=_by_cut(problem))
    starts = starts[:REFINED]
    if contiguous:
        starts.append(_mixed(problem, solved, starts[0], limit))
    improved = (_improved(problem, each, limit, contiguous) for each in starts)
    return min(improved, key=_by_cut(problem))


def emptiest(problem: Problem, contiguous: bool = True) -> _Chosen:
    """The partition of each atom if nothing but memory counted, without a limit."""
    relaxed = dataclasses.replace(problem, memory_weight=1.0, memory_limit=None)
    solved = [Stretches(relaxed, order) for order in orders(relaxed)]
    found = _best_balanced(relaxed, solved, contiguous)
    assert found is not None, "there is no limit that could be exceeded"
    return found


def _best_balanced(
    problem: Problem, solved: Sequence[Stretches], contiguous: bool
) -> _Chosen | None:
    """With the lightest fullest partition that was found within the memory limit."""
    best = min(solved, key=lambda each: each.best_bottleneck)
    chosen = best.cheapest(best.best_bottleneck) or emptiest(problem, contiguous)
    starts = [chosen] if contiguous else [chosen, _largest_first(problem)]
    # A load that nobody can have: what counts is by how much it is exceeded.
    refined = [refine(problem, start, 0.0, contiguous) for start in starts]
    chosen = min(refined, key=lambda each: _over(problem, each))
    if contiguous:
        chosen = _lightest_near(problem, chosen, [each.order for each in solved])
    limit = problem.memory_limit
    is_within = limit is None or max(problem.memory(chosen)) <= limit
    return chosen if is_within else None


def _lightest_near(
    problem: Problem, chosen: _Chosen, orders: Sequence[Sequence[int]]
) -> _Chosen:
    """The best of all contiguous partitions if they are few, else of those nearby and
    of those that the orders can be packed into."""
    every = all_borders(problem)
    if every is not None:
        return every.lightest(max(problem.loads(chosen))) or chosen
    if len(orders) > 1:
        chosen = pack(problem, orders, max(problem.loads(chosen))) or chosen
    for _ in range(MAX_ROUNDS):
        worst = max(problem.loads(chosen))
        found = near_borders(problem, chosen, by_load=True).lightest(worst) or chosen
        if max(problem.loads(found)) > worst * (1.0 - PRECISION):
            break
        chosen = found
    return chosen


def _mixed(
    problem: Problem, solved: Sequence[Stretches], chosen: _Chosen, limit: float
) -> _Chosen:
    """The best with each border from another order, or near to those of a partition."""
    borders = [each.borders(limit) for each in solved]
    of_orders = [
        [mask for masks in same for mask in masks]
        for same in zip(*(each for each in borders if each is not None))
    ]
    return near_borders(problem, chosen, of_orders).cheapest(limit) or chosen


def _largest_first(problem: Problem) -> _Chosen:
    """The largest atom goes where it leaves the lightest rank, then the next; the last
    ones to ranks that have none (Graham 1969)."""
    loads = [0.0] * problem.num_partitions
    chosen = [0] * problem.num_atoms
    empty = set(range(problem.num_partitions))
    order = sorted(range(problem.num_atoms), key=lambda a: -problem.atom_loads[a])
    for place, atom in enumerate(order):
        static = problem.weighted_static[atom]
        kept = problem.weighted_activations[atom]
        left = problem.num_atoms - place
        ranks = sorted(empty) if left <= len(empty) else range(len(loads))
        after = {p: loads[p] + static + problem.in_flight[p] * kept for p in ranks}
        p = min(after, key=lambda p: (after[p], p))
        loads[p], chosen[atom] = after[p], p
        empty.discard(p)
    return tuple(chosen)


def _over(problem: Problem, chosen: _Chosen) -> tuple[int, float]:
    """Bytes above the memory limit, then the load of the fullest rank."""
    limit = problem.memory_limit
    excess = 0 if limit is None else max(0, max(problem.memory(chosen)) - limit)
    return excess, max(problem.loads(chosen))


def _best_of_all(problem: Problem) -> _Chosen:
    ranks = range(problem.num_partitions)
    found = [
        chosen
        for chosen in itertools.product(ranks, repeat=problem.num_atoms)
        if len(set(chosen)) == problem.num_partitions
    ]
    excess, worst = min(_over(problem, chosen) for chosen in found)
    if excess:
        raise _over_limit(problem, contiguous=False)
    limit = worst * (1.0 + SLACK)
    allowed = (chosen for chosen in found if _over(problem, chosen) <= (0, limit))
    return min(allowed, key=_by_cut(problem))


def _improved(
    problem: Problem, chosen: _Chosen, limit: float, contiguous: bool
) -> _Chosen:
    """Refined; the best stretches of its order; the best nearby: while that helps."""
    tries = 1 + MOVES // (problem.num_atoms * problem.num_partitions)
    key = _by_cut(problem)
    for _ in range(MAX_ROUNDS):
        refined = refine(problem, chosen, limit, contiguous)
        if contiguous:
            for order in itertools.islice(_moved_orders(problem, refined), tries):
                again = Stretches(problem, order).cheapest(limit)
                refined = min(refined, again or refined, key=key)
            again = near_borders(problem, refined).cheapest(limit)
            refined = min(refined, again or refined, key=key)
        if key(refined) >= key(chosen):
            break
        chosen = refined
    return chosen


def _moved_orders(problem: Problem, chosen: _Chosen) -> Iterator[tuple[int, ...]]:
    """The order of a partition; then with one atom early or late in it, of those that
    could be on several ranks and weigh most.

    A head beside the model, the keys of an encoder's output: whether such an atom is on
    one rank or another moves all borders between the two.
    """
    yield by_partition(chosen, range(problem.num_atoms))
    last = problem.num_partitions - 1
    low, high = [0] * problem.num_atoms, [last] * problem.num_atoms
    for u, v in problem.edges:
        low[v], high[u] = max(low[v], chosen[u]), min(high[u], chosen[v])
    free = [a for a in range(problem.num_atoms) if high[a] > low[a] + 1]
    free.sort(key=lambda atom: -problem.atom_loads[atom])
    for atom in free:
        for p in range(low[atom], high[atom] + 1):
            if p != chosen[atom]:
                moved = [*chosen[:atom], p, *chosen[atom + 1 :]]
                yield by_partition(moved, range(problem.num_atoms))


def _by_cut(problem: Problem) -> Callable[[_Chosen], tuple[int, int, float, _Chosen]]:
    return lambda chosen: (
        problem.cut_bytes(chosen),
        problem.num_messages(chosen),
        max(problem.loads(chosen)),
        chosen,
    )


def _require_enough_atoms(problem: Problem) -> None:
    if problem.num_partitions > problem.num_atoms:
        raise PartitionError(
            "each partition needs at least one atom:"
            f" {problem.parts} atoms={problem.num_atoms}; use fewer"
            " partitions, or give the model more layers (operations that share a"
            " variable, and one call of a layer, cannot be torn apart)"
        )


def _over_limit(problem: Problem, contiguous: bool) -> PartitionError:
    smallest = max(problem.memory(emptiest(problem, contiguous)))
    return PartitionError(
        "no rank may need more than memory_limit_bytes:"
        f" memory_limit_bytes={problem.memory_limit}"
        f" {problem.parts}; the smallest that can be kept is"
        f" {smallest}; use more partitions, smaller or fewer active microbatches, or a"
        " larger limit"
    )


def follow_placement(
    atoms: Atoms,
    owner: Mapping[int, int],
    partition_of_layer: Mapping[str, int],
) -> tuple[int, ...] | None:
    """Partitions for a step whose model was partitioned by an earlier step.

    Args:
        owner: variable index -> partition, for the variables that have an owner.
        partition_of_layer: layer path -> partition of the earlier step.

    Returns:
        The partition of each atom; an atom without variables goes where its layer went,
        or where the atom before it is. None when no atom has an owner yet.

    Raises:
        PartitionError: an atom joins variables that already have different owners.
    """
    chosen: list[int | None] = []
    for atom in atoms.atoms:
        owners = {owner[index] for index in atom.variables if index in owner}
        if len(owners) > 1:
            raise PartitionError(
                "operations that use the same variable must be on one partition:"
                f" layers={list(atom.layers)} join variables that an earlier step put"
                f" on partitions {sorted(owners)}; call first the step that uses them"
                " together"
            )
        known = [
            partition_of_layer[layer]
            for layer in atom.layers
            if layer in partition_of_layer
        ]
        chosen.append(next(iter(owners), known[0] if known else None))
    if all(partition is None for partition in chosen):
        return None
    last = next(partition for partition in chosen if partition is not None)
    settled = []
    for partition in chosen:
        last = last if partition is None else partition
        settled.append(last)
    return tuple(settled)
