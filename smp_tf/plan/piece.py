"""Cut a segment that returns much into pieces that run one after the other.

A backward begins with what other ranks wait for (see ``weight_gradients``), and that
leaves before the rest runs.

A function that is not inlined publishes its outputs when all of it is done: the
gradients of a whole partition exist beside their running sums, which is twice the
weights. A piece returns its gradients as soon as it has made them, and they are added
to the sums before the next piece begins; replicas average them while the others are
made. They come in the order in which backward makes them, the last layer's first:

    nodes    dx_2 dw_2 dx_1 dw_1 | Identity(dw_1) Identity(dw_2)     as they are traced
    pieces   dx_2 dw_2 Identity(dw_2) | dx_1 dw_1 Identity(dw_1)
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping

from smp_tf.plan.graph import Graph, node_of
from smp_tf.plan.segment import Segment

PIECE_BYTES = 32 * 2**20
MAX_PIECES = 16
"""A piece ends with the gradient that makes it return as many bytes, or that part of
the segment's."""


def split_segment(
    graph: Graph,
    segment: Segment,
    gradient_bytes: Mapping[str, int],
    limit: int = PIECE_BYTES,
) -> list[Segment]:
    """Pieces in order; nodes, inputs and outputs differ, all else is the segment's.

    Args:
        gradient_bytes: returned tensors that are added up -> their size.
        limit: bytes of returned tensors that end a piece.
    """
    total = sum(gradient_bytes.get(tensor, 0) for tensor in segment.outputs)
    limit = max(limit, total // MAX_PIECES)
    if total < 2 * limit:
        if not segment.late:
            return [segment]
        limit = total + 1
    number = _number_nodes(graph, segment, gradient_bytes, limit)
    if any(node_of(tensor) not in number for tensor in segment.outputs):
        return [segment]
    crossing = {
        tensor
        for name in segment.nodes
        for tensor in graph.by_name[name].inputs
        if number.get(node_of(tensor), number[name]) != number[name]
    }
    if any(graph.spec(tensor).dtype in ("variant", "resource") for tensor in crossing):
        return [segment]
    count = max(number.values()) + 1
    return [_piece(graph, segment, number, crossing, i) for i in range(count)]


def number_pieces(pieces: Iterable[Segment]) -> dict[tuple[int, str], int]:
    """(stage, tensor that leaves it) -> which of the stage's pieces makes it.

    Args:
        pieces: those of a stage in order.
    """
    found: dict[tuple[int, str], int] = {}
    count: dict[int, int] = {}
    for piece in pieces:
        number = count.setdefault(piece.stage, 0)
        found.update({(piece.stage, tensor): number for tensor in piece.outputs})
        count[piece.stage] += 1
    return found


def _number_nodes(
    graph: Graph, segment: Segment, gradient_bytes: Mapping[str, int], limit: int
) -> dict[str, int]:
    """Node -> piece. What may wait is made in the first piece that uses it."""
    returned: dict[str, int] = {}
    for tensor in segment.outputs:
        name = node_of(tensor)
        returned[name] = returned.get(name, 0) + gradient_bytes.get(tensor, 0)
    number: dict[str, int] = {}
    current = filled = 0
    late = set(segment.late)
    first = [name for name in segment.nodes if name not in late]
    copies = {name for name in returned if _is_copy(graph, name, returned)}
    for part in (first, segment.late):
        if part is segment.late and late:
            current, filled = current + 1, 0
        for name in _behind_sources(graph, part, copies):
            if filled >= limit:
                current, filled = current + 1, 0
            number[name] = current
            filled += returned.get(name, 0)
    nodes = [graph.by_name[name] for name in segment.nodes]
    writes = any(node.writes for node in nodes)
    first_use: dict[str, int] = {}
    for node in reversed(nodes):
        is_read = node.op == "ReadVariableOp" and not writes
        if node.name not in returned and (is_read or not node.is_stateful):
            number[node.name] = first_use.get(node.name, number[node.name])
        controls = () if node.name in copies else node.controls
        for source in (*map(node_of, node.inputs), *controls):
            first_use[source] = min(
                first_use.get(source, number[node.name]), number[node.name]
            )
    return number


def _is_copy(graph: Graph, name: str, returned: Mapping[str, int]) -> bool:
    """Whether a node returns the gradient that another one has made.

    What a traced function returns is copied at its end, in the order of the returned
    structure, which is that of the variables; and after all that it writes, which does
    not change what was made before.
    """
    return returned[name] > 0 and graph.by_name[name].op == "Identity"


def _behind_sources(
    graph: Graph, names: Iterable[str], copies: Collection[str]
) -> list[str]:
    """The nodes, copies right behind what they copy."""
    left = dict.fromkeys(names)
    behind: dict[str, list[str]] = {}
    for name in left:
        if name in copies:
            source = node_of(graph.by_name[name].inputs[0])
            if source in left:
                behind.setdefault(source, []).append(name)
    moved = {name for each in behind.values() for name in each}
    found: list[str] = []
    waiting = [name for name in reversed(left) if name not in moved]
    while waiting:
        found.append(waiting.pop())
        waiting += reversed(behind.get(found[-1], []))
    return found


def _piece(
    graph: Graph,
    segment: Segment,
    number: Mapping[str, int],
    crossing: set[str],
    i: int,
) -> Segment:
    nodes = tuple(name for name in segment.nodes if number[name] == i)
    read = {tensor for name in nodes for tensor in graph.by_name[name].inputs}
    sources = {node_of(tensor) for tensor in read}
    made = sorted(t for t in crossing if number[node_of(t)] == i)
    returned = [t for t in segment.outputs if number[node_of(t)] == i]
    return dataclasses.replace(
        segment,
        nodes=nodes,
        arguments=tuple(t for t in segment.arguments if t in read),
        captures=tuple(name for name in segment.captures if name in sources),
        inputs=tuple(t for t in segment.inputs if t in read)
        + tuple(sorted(t for t in crossing & read if number[node_of(t)] != i)),
        outputs=tuple(dict.fromkeys([*returned, *made])),
    )
