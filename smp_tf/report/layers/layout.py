"""Where the boxes of a model and the lines between them are drawn.

Each partition is a lane from top to bottom; a box is one row below what it reads in its
lane, branches stand side by side. Lines run at right angles in what is left free:

    gutter 0 |   lane 0          | gutter 1 |   lane 1          | gutter 2
             |   [ a ]-----------|--+       |                   |
             |     |     a line past b      +-->[ d ]           |
             |   [ b ] |         |          |                   |
             |     |   | (side)  |          |                   |
             |   [ c ]<+         |          |                   |

A tensor for a lane that is not the next one goes around: over the lanes forward, and
below them back to where tied weights are.
"""

import dataclasses
from collections.abc import Sequence

from smp_tf.report.layers.cells import Tracks, place_cells
from smp_tf.report.layers.graph import LayerGraph, Link

ROOM = 1306  # what most screens show; a wider picture is scrolled
WIDEST, NARROWEST, HEIGHT = 220, 114, 39  # of a box
GAP_X, GAP_Y = 11, 15
HEADER = 68  # of a lane
PADDING = 12
TRACK = 8  # between parallel lines
LABEL = 65  # beside a lane, for the bytes that leave it
LABEL_Y = 14
_BESIDE = 0.28  # of a box's height, from its middle: lines past other boxes

Point = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Rectangle:
    x: float
    y: float
    width: float
    height: float

    @property
    def right(self) -> float:
        return self.x + self.width

    @property
    def middle(self) -> Point:
        return self.x + self.width / 2, self.y + self.height / 2

    @property
    def bottom(self) -> float:
        return self.y + self.height


@dataclasses.dataclass(frozen=True)
class Route:
    """Lines from one box.

    Attributes:
        lines: corners of each line; the last one of each is an arrow's head.
        links: what they carry.
        is_crossing: to another partition.
        is_return: back to an earlier one.
        label: where its bytes are written, for those that cross.
    """

    lines: tuple[tuple[Point, ...], ...]
    links: tuple[Link, ...]
    is_crossing: bool = False
    is_return: bool = False
    label: Point = (0.0, 0.0)

    @property
    def tensors(self) -> dict[str, int]:
        """Name -> bytes: one tensor for several boxes of a lane crosses once."""
        return {name: size for link in self.links for name, size in link.tensors}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A picture's geometry, in pixels; boxes and lanes as the graph numbers them."""

    width: float
    height: float
    boxes: tuple[Rectangle, ...]
    lanes: tuple[Rectangle, ...]
    routes: tuple[Route, ...]


def lay_out(graph: LayerGraph, num_lanes: int) -> Layout:
    """The geometry of a graph."""
    return _Layout(graph, num_lanes).build()


class _Layout:
    """The state of ``lay_out``.

    Rows are known before columns: y is fixed first, then every line takes a track in
    the channels it runs through, which gives their widths and so every x.
    """

    def __init__(self, graph: LayerGraph, num_lanes: int) -> None:
        self.graph, self.n = graph, num_lanes
        self.cells = place_cells(graph)
        self.at = {(c.lane, c.row, c.column): i for i, c in enumerate(self.cells)}
        self.columns = [
            max((c.column + 1 for c in self.cells if c.lane == lane), default=1)
            for lane in range(num_lanes)
        ]
        self.rows = max((c.row + 1 for c in self.cells), default=1)
        # Beside each column; the one after the last column is a lane's margin.
        self.sides = [[Tracks() for _ in range(count + 1)] for count in self.columns]
        self.gutters = [Tracks() for _ in range(num_lanes + 1)]
        self.over, self.below = Tracks(), Tracks()
        self.labels: list[list[float]] = [[] for _ in range(num_lanes)]

    def build(self) -> Layout:
        inside, nets = self._sort_links()
        # Tracks first: they say how much room each channel needs.
        side_track = {link: self._take_side(link) for link in inside}
        net_tracks = [self._take_net(*net) for net in nets]
        self._fix_x()
        routes = [
            Route((self._inside(link, side_track[link]),), (link,)) for link in inside
        ]
        for (source, lane, links), tracks in zip(nets, net_tracks, strict=True):
            routes.append(self._crossing(source, lane, links, tracks))
        top = self.top - HEADER
        lanes = tuple(
            Rectangle(self.lane_x[p], top, self.lane_width[p], self.bottom - top)
            for p in range(self.n)
        )
        height = self.bottom + (len(self.below.taken) + 1) * TRACK
        boxes = tuple(self.box(i) for i in range(len(self.cells)))
        return Layout(self.width, height, boxes, lanes, tuple(routes))

    # --- places

    @property
    def top(self) -> float:
        """Of the first row. Unknown until all nets have their tracks above it."""
        return (len(self.over.taken) + 1) * TRACK + HEADER

    @property
    def bottom(self) -> float:
        return self.top + self.rows * (HEIGHT + GAP_Y)

    def y(self, row: int) -> float:
        """From ``top``."""
        return row * (HEIGHT + GAP_Y)

    def _fix_x(self) -> None:
        """As wide as there is room; twice, for the room is what boxes leave."""
        self.box_width = 0.0
        rest = self._place_lanes()
        each = (ROOM - rest) / sum(self.columns)
        self.box_width = float(min(max(each, NARROWEST), WIDEST))
        self.width = self._place_lanes()

    def _place_lanes(self) -> float:
        """Returns the width of all."""
        self.lane_x: list[float] = []
        self.lane_width: list[float] = []
        self.gutter_x: list[float] = []
        x = 0.0
        for lane in range(self.n + 1):
            tracks = len(self.gutters[lane].taken)
            has_labels = lane > 0 and bool(self.labels[lane - 1])
            self.gutter_x.append(x + (LABEL if has_labels else 0))
            x = self.gutter_x[-1] + tracks * TRACK + TRACK
            if lane < self.n:
                count, sides = self.columns[lane], len(self.sides[lane][-1].taken)
                width = count * (self.box_width + GAP_X) - GAP_X + 2 * PADDING
                self.lane_x.append(x)
                self.lane_width.append(width + (sides + 0.5) * TRACK * bool(sides))
                x += self.lane_width[-1]
        return x

    def box(self, i: int) -> Rectangle:
        cell = self.cells[i]
        x = self.lane_x[cell.lane] + PADDING + cell.column * (self.box_width + GAP_X)
        return Rectangle(x, self.top + self.y(cell.row), self.box_width, HEIGHT)

    def _is_free(self, lane: int, column: int, rows: range) -> bool:
        return not any((lane, row, column) in self.at for row in rows)

    def _is_open(self, i: int, step: int) -> bool:
        """Whether nothing stands beside a box on the way out of its lane."""
        cell = self.cells[i]
        way = (
            range(cell.column + 1, self.columns[cell.lane])
            if step > 0
            else range(cell.column)
        )
        return not any((cell.lane, cell.row, column) in self.at for column in way)

    # --- lines inside a lane

    def _sort_links(self) -> tuple[list[Link], list[tuple[int, int, list[Link]]]]:
        """Links inside lanes; those that cross, by box and the lane they go to."""
        inside, nets = [], dict[tuple[int, int], list[Link]]()
        for link in self.graph.links:
            source, target = self.cells[link.source], self.cells[link.target]
            if source.lane == target.lane and source.row < target.row:
                inside.append(link)
            else:
                nets.setdefault((link.source, target.lane), []).append(link)
        return inside, [(*key, links) for key, links in nets.items()]

    def _way(self, link: Link) -> str:
        source, target = self.cells[link.source], self.cells[link.target]
        between = range(source.row + 1, target.row)
        if self._is_free(source.lane, source.column, between):
            return "source"
        if self._is_free(source.lane, target.column, between):
            return "target"
        return "side"

    def _take_side(self, link: Link) -> tuple[int, int]:
        """Column to the right of both ends that is free all the way, and a track."""
        if self._way(link) != "side":
            return 0, 0
        source, target = self.cells[link.source], self.cells[link.target]
        column = max(source.column, target.column) + 1
        rows = range(source.row, target.row + 1)
        while not self._is_free(source.lane, column, rows):
            column += 1
        start = self.y(source.row) + HEIGHT * (0.5 + _BESIDE)
        end = self.y(target.row) + HEIGHT * (0.5 - _BESIDE)
        column = min(column, self.columns[source.lane])
        return column, self.sides[source.lane][column].take(start, end)

    def _inside(self, link: Link, side: tuple[int, int]) -> tuple[Point, ...]:
        """Corners of a line: down the source's column, the target's, or past both."""
        source, target = self.box(link.source), self.box(link.target)
        (x0, _), (x1, _) = source.middle, target.middle
        way = self._way(link)
        if x0 == x1 and way == "source":
            return (x0, source.bottom), (x0, target.y)
        if way == "source":
            y = target.y - GAP_Y * 0.6
            return (x0, source.bottom), (x0, y), (x1, y), (x1, target.y)
        if way == "target":
            y = source.bottom + GAP_Y * 0.4
            return (x0, source.bottom), (x0, y), (x1, y), (x1, target.y)
        lane = self.cells[link.source].lane
        column, track = side
        is_margin = column == self.columns[lane]
        x = self.lane_x[lane] + PADDING + column * (self.box_width + GAP_X)
        x += (track + 1) * TRACK - GAP_X * is_margin
        leave, enter = self._leave(link.source, _BESIDE), self._enter(
            link.target, 1, -0.28
        )
        return (*leave, (x, leave[-1][1]), (x, enter[0][1]), *enter)

    def _leave(self, i: int, offset: float) -> tuple[Point, ...]:
        """Corners out of a box to its right: from its side, or from below it."""
        box = self.box(i)
        if self._is_open(i, 1):
            return ((box.right, box.middle[1] + offset * HEIGHT),)
        x, y = box.middle[0] + box.width / 4, box.bottom + GAP_Y * 0.4
        return (x, box.bottom), (x, y)

    def _enter(self, i: int, step: int, offset: float) -> tuple[Point, ...]:
        """Corners into a box from its right (``step`` 1) or left (-1)."""
        box = self.box(i)
        if self._is_open(i, step):
            side = box.right if step > 0 else box.x
            return ((side, box.middle[1] + offset * HEIGHT),)
        x, y = box.middle[0] + step * box.width / 4, box.y - GAP_Y * 0.4
        return (x, y), (x, box.y)

    # --- lines to another lane

    def _take_net(
        self, source: int, lane: int, links: Sequence[Link]
    ) -> tuple[float, int, int, int]:
        """y of its label; tracks beside its lane, around all, beside the other."""
        cell = self.cells[source]
        level = self.y(cell.row) + HEIGHT / 2
        label = level
        while any(abs(label - other) < LABEL_Y for other in self.labels[cell.lane]):
            label += LABEL_Y
        self.labels[cell.lane].append(label)
        ends = [self.y(self.cells[link.target].row) + HEIGHT / 2 for link in links]
        out = cell.lane + 1
        if lane == out:
            return (
                label,
                self.gutters[out].take(min(label, *ends), max(label, *ends)),
                0,
                0,
            )
        forward = lane > cell.lane
        edge = -1e9 if forward else 1e9
        channel = self.over if forward else self.below
        return (
            label,
            self.gutters[out].take(label, edge),
            channel.take(out, lane),
            self.gutters[lane].take(edge, max(ends) if forward else min(ends)),
        )

    def _crossing(
        self,
        source: int,
        lane: int,
        links: Sequence[Link],
        tracks: tuple[float, int, int, int],
    ) -> Route:
        label, first, around, last = tracks
        cell = self.cells[source]
        level = self.top + label
        box = self.box(source)
        start = self._leave(source, 0.0)
        edge = self.lane_x[cell.lane] + self.lane_width[cell.lane]
        if len(start) == 1 and start[0][1] != level:  # another line leaves there
            y = min(level, box.bottom - 4)
            bend = edge + 2.0
            start = ((box.right, y), (bend, y), (bend, level))
        elif len(start) > 1:
            start = (*start, (edge + 2.0, start[-1][1]), (edge + 2.0, level))
        out = self.gutter_x[cell.lane + 1] + (first + 0.5) * TRACK
        trunk = (*start, (out, level))
        if lane != cell.lane + 1:
            is_forward = lane > cell.lane
            y = (
                self.top - HEADER - (around + 0.7) * TRACK
                if is_forward
                else self.bottom + (around + 0.7) * TRACK
            )
            x = self.gutter_x[lane] + (last + 0.5) * TRACK
            trunk, out = (*trunk, (out, y), (x, y)), x
        lines = []
        for link in links:
            enter = self._enter(link.target, -1, 0.0)
            lines.append((*trunk, (out, enter[0][1]), *enter))
        return Route(
            tuple(lines),
            tuple(links),
            is_crossing=self.cells[links[0].target].lane != cell.lane,
            is_return=lane <= cell.lane,
            label=(edge + 7, level - 4),
        )
