"""Which gradients are added to their running sums in one go."""

from collections.abc import Iterable, Mapping, Sequence, Set

from smp_tf.plan.graph import Graph
from smp_tf.plan.segment import Segment, SegmentPlan

ADD_BYTES = 16 * 2**20
"""Gradients added in one call; the memory that adding takes for a moment."""


def group_sums(
    graph: Graph,
    plan: SegmentPlan,
    partition: int,
    pieces: Sequence[Segment],
    summed: Set[int],
) -> Mapping[int, list[list[tuple[int, ...]]]]:
    """What to add after each piece of a partition's segments.

    Args:
        pieces: of all its segments; those of one stage in order.
        summed: positions in the graph's returns of what is added up.

    Returns:
        stage -> for each piece, groups of positions to add at a time.
    """
    by_tensor: dict[tuple[int, str], list[int]] = {}
    for position in sorted(summed):
        tensor = graph.returns[position]
        stages = plan.return_stage[tensor]
        if partition in stages:
            by_tensor.setdefault((stages[partition], tensor), []).append(position)
    found: dict[int, list[list[tuple[int, ...]]]] = {}
    for piece in pieces:
        positions = sorted(
            position
            for tensor in piece.outputs
            for position in by_tensor.get((piece.stage, tensor), ())
        )
        sized = [(p, graph.spec(graph.returns[p]).num_bytes) for p in positions]
        found.setdefault(piece.stage, []).append(group_by_bytes(sized, ADD_BYTES))
    return found


def group_by_bytes(
    sized: Iterable[tuple[int, int]], limit: int
) -> list[tuple[int, ...]]:
    """Split (item, bytes), in order, into groups of at most ``limit`` bytes or one."""
    groups: list[tuple[int, ...]] = []
    room = 0
    for item, size in sized:
        if groups and size <= room:
            groups[-1] += (item,)
        else:
            groups.append((item,))
            room = limit
        room -= size
    return groups
