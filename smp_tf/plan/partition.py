"""Assign atoms to partitions: balanced contiguous stretches, then few bytes cut."""

import bisect
import itertools
from collections.abc import Mapping, Sequence

from smp_tf.errors import PartitionError
from smp_tf.plan.atoms import Atoms
from smp_tf.plan.graph import Graph, node_of
from smp_tf.plan.roles import Roles

SLACK = 0.02
"""How much worse than the best balance a partition may be to cut fewer bytes: an
imbalance of 2 % costs 2 % of the step, about what sending an activation costs."""


def partition_atoms(
    loads: Sequence[float], cut_bytes: Sequence[int], num_partitions: int
) -> tuple[int, ...]:
    """Split atoms 0..n-1 into contiguous, non-empty partitions.

    The heaviest partition is as light as possible (within ``SLACK``); among such splits
    the one that cuts the fewest bytes is taken, then the more balanced one, then the
    earliest.

    Args:
        loads: weight of each atom, >= 0.
        cut_bytes: [n + 1] bytes that cross ranks when atoms i-1 and i are separated.

    Returns:
        The partition of each atom, ascending.

    Raises:
        PartitionError: more partitions than atoms.
    """
    n = len(loads)
    if num_partitions > n:
        raise PartitionError(
            f"each partition needs at least one atom: partitions={num_partitions}"
            f" atoms={n}; use fewer partitions, or give the model more layers"
            " (operations that share a variable, and one call of a layer, cannot be"
            " torn apart)"
        )
    total = [0.0, *itertools.accumulate(loads)]
    limit = _best_bottleneck(total, num_partitions) * (1.0 + SLACK)
    bounds = _cheapest_bounds(total, cut_bytes, num_partitions, limit)
    return tuple(
        partition
        for partition, (start, end) in enumerate(itertools.pairwise(bounds))
        for _ in range(start, end)
    )


def _best_bottleneck(total: Sequence[float], num_partitions: int) -> float:
    """Smallest load of the heaviest partition: dynamic programming over prefixes.

    best[k][i] = min over j of max(best[k-1][j], load(j..i)); the first term grows with
    j and the second shrinks, so the crossing is found by bisection.
    """
    n = len(total) - 1
    best = [total[i] for i in range(n + 1)]
    for k in range(2, num_partitions + 1):
        previous, best = best, [float("inf")] * (n + 1)
        for i in range(k, n + 1):
            low, high = k - 1, i - 1
            while low < high:
                middle = (low + high) // 2
                if previous[middle] < total[i] - total[middle]:
                    low = middle + 1
                else:
                    high = middle
            for j in (low - 1, low):
                if k - 1 <= j < i:
                    best[i] = min(best[i], max(previous[j], total[i] - total[j]))
    return best[n]


def _cheapest_bounds(
    total: Sequence[float], cut_bytes: Sequence[int], num_partitions: int, limit: float
) -> tuple[int, ...]:
    """Bounds 0 = b0 < .. < bp = n, every load <= limit, with the fewest bytes cut."""
    n = len(total) - 1
    epsilon = 1e-12 * max(total[-1], 1.0)
    # state at (k, i): (bytes cut, heaviest load, bounds so far)
    rows: list[dict[int, tuple[int, float, tuple[int, ...]]]] = [{0: (0, 0.0, (0,))}]
    for k in range(1, num_partitions + 1):
        row: dict[int, tuple[int, float, tuple[int, ...]]] = {}
        ends = [n] if k == num_partitions else range(k, n - (num_partitions - k) + 1)
        for i in ends:
            first = bisect.bisect_left(total, total[i] - limit - epsilon)
            candidates = [
                (
                    rows[-1][j][0] + (cut_bytes[i] if i < n else 0),
                    max(rows[-1][j][1], total[i] - total[j]),
                    (*rows[-1][j][2], i),
                )
                for j in range(max(first, k - 1), i)
                if j in rows[-1]
            ]
            if candidates:
                row[i] = min(candidates)
        rows.append(row)
    return rows[-1][n][2]


def cut_bytes_between(graph: Graph, roles: Roles, atoms: Atoms) -> tuple[int, ...]:
    """[n + 1] bytes per microbatch that cross if atoms i-1 and i are separated."""
    n = len(atoms.atoms)
    change = [0] * (n + 2)
    spans: dict[str, tuple[int, int]] = {}
    for node in graph.nodes:
        reader = atoms.atom_of.get(node.name)
        if reader is None:
            continue
        for tensor in node.inputs:
            source = node_of(tensor)
            if source in atoms.atom_of and roles.is_placed(source):
                start = atoms.atom_of[source]
                low, high = spans.get(tensor, (start, start))
                spans[tensor] = (min(low, reader), max(high, reader))
    for tensor, (low, high) in spans.items():
        size = graph.spec(tensor).num_bytes
        change[low + 1] += size
        change[high + 1] -= size
    return tuple(itertools.accumulate(change))[: n + 1]


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
