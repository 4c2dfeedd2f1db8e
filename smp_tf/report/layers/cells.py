"""The grid of a picture: the cell of each box, and tracks for parallel lines."""

import dataclasses

from smp_tf.report.layers.graph import LayerGraph


@dataclasses.dataclass(frozen=True)
class Cell:
    """Place of a box in its lane."""

    lane: int
    row: int
    column: int


def place_cells(graph: LayerGraph) -> tuple[Cell, ...]:
    """Rows by the longest way inside a lane; a branch keeps its column."""
    before: list[list[int]] = [[] for _ in graph.boxes]
    after: list[list[int]] = [[] for _ in graph.boxes]
    for link in graph.links:
        same = graph.boxes[link.source].partition == graph.boxes[link.target].partition
        if same and link.source < link.target:
            before[link.target].append(link.source)
            after[link.source].append(link.target)
    row = [0] * len(graph.boxes)
    for i, sources in enumerate(before):
        row[i] = max((row[source] + 1 for source in sources), default=0)
    for i in reversed(range(len(row))):
        if not before[i] and after[i]:  # a start stands just above what reads it
            row[i] = min(row[target] for target in after[i]) - 1
    taken: set[tuple[int, int, int]] = set()
    column = [0] * len(graph.boxes)
    for i in sorted(range(len(row)), key=lambda i: (row[i], i)):
        lane = graph.boxes[i].partition
        wanted = min((column[source] for source in before[i]), default=0)
        while (lane, row[i], wanted) in taken:
            wanted += 1
        column[i] = wanted
        taken.add((lane, row[i], wanted))
    return tuple(
        Cell(box.partition, row[i], column[i]) for i, box in enumerate(graph.boxes)
    )


class Tracks:
    """Parallel lines in a channel: those that would touch get tracks of their own."""

    def __init__(self) -> None:
        self.taken: list[list[tuple[float, float]]] = []

    def take(self, one: float, other: float) -> int:
        low, high = min(one, other) - 4, max(one, other) + 4
        for track, spans in enumerate(self.taken):
            if all(high < start or end < low for start, end in spans):
                spans.append((low, high))
                return track
        self.taken.append([(low, high)])
        return len(self.taken) - 1
