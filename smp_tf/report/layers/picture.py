"""The model as a picture: a lane for each partition, a box for each layer or block."""

import math
from collections.abc import Mapping, Sequence

from smp_tf.plan.step_plan import StepPlan
from smp_tf.report.layers.graph import Box, LayerGraph, layer_graph
from smp_tf.report.layers.layout import Layout, Point, Rectangle, Route, lay_out
from smp_tf.report.markup import number, sized, tag, text

_CORNER = 6.0
_THIN, _THICK = 1.25, 5.0
_LAYERS_TOLD = 12
_LETTER, _MARGIN = 7.5, 20  # of a name in a box; the sheet cuts off what is wider yet


def layer_picture(plan: StepPlan, notes: Mapping[int, str]) -> str:
    """Lanes from left to right, boxes with their memory, lines as wide as their bytes.

    Args:
        notes: atom -> why it is where it is.
    """
    graph = layer_graph(plan)
    layout = lay_out(graph, plan.num_partitions)
    size = f"width:{number(layout.width)}px;height:{number(layout.height)}px"
    return tag(
        "div",
        tag(
            "div",
            *_lanes(plan, graph, layout),
            _lines(graph, layout),
            *_boxes(plan, graph, layout, notes),
            class_="canvas",
            style=size,
        ),
        class_="scroll",
        tabindex=0,
    )


def _lanes(plan: StepPlan, graph: LayerGraph, layout: Layout) -> list[str]:
    whole = sum(cost.seconds for cost in plan.costs) or 1.0
    found = []
    for partition, lane in enumerate(layout.lanes):
        boxes = [box for box in graph.boxes if box.partition == partition]
        layers = {layer for box in boxes for layer in box.layers}
        share = sum(box.seconds for box in boxes) / whole
        found.append(
            tag(
                "div",
                tag("b", f"partition {partition}"),
                tag("span", f"{share:.0%} of the compute"),
                tag("span", f"{len(layers)} layers"),
                class_=f"lane p{partition}",
                data_partition=partition,
                style=_style(lane),
            )
        )
    return found


def _boxes(
    plan: StepPlan, graph: LayerGraph, layout: Layout, notes: Mapping[int, str]
) -> list[str]:
    most = max((box.memory for box in graph.boxes), default=0) or 1
    whole = sum(cost.seconds for cost in plan.costs) or 1.0
    found = []
    for box, place in zip(graph.boxes, layout.boxes, strict=True):
        path, name = _two_lines(box.name, place.width)
        bar = tag("i", style=f"width:{100 * box.memory / most:.1f}%")
        found.append(
            tag(
                "div",
                tag("bdi", text(name)),
                tag("small", tag("span", text(path)), tag("b", _memory(box))),
                tag("span", bar, class_="bar"),
                class_=f"box p{box.partition}",
                data_partition=box.partition,
                data_atoms=" ".join(map(str, box.atoms)),
                data_bytes=box.memory,
                title=_told(box, box.seconds / whole, notes),
                style=_style(place),
            )
        )
    return found


def _memory(box: Box) -> str:
    return sized(box.memory) if box.memory else "–"


def _two_lines(name: str, width: float) -> tuple[str, str]:
    """(where, what), the second short enough: its first words go to the first, and if
    that does not do, its middle is left out, for names of layers end in a number."""
    room = int((width - _MARGIN) / _LETTER)
    where, has_operations, what = name.partition(" · ")
    if has_operations:
        return where, what if len(what) <= room else f"{what[: room - 1]}…"
    name, has_more, more = name.partition(" (+")  # "dense_3 (+2)"
    where, _, what = name.rpartition("/")
    words, first = what.split("_"), 0
    while len("_".join(words[first:])) > room and not _is_last(words[first + 1 :]):
        first += 1
    where = "/".join(filter(None, (where, "_".join(words[:first]))))
    where = " ".join(filter(None, (where, has_more and f"+{more[:-1]}")))
    what = "_".join(words[first:])
    if len(what) > room:
        head = room // 3
        what = f"{what[:head]}…{what[len(what) - (room - 1 - head):]}"
    return where, what


def _is_last(words: Sequence[str]) -> bool:
    """A name does not begin with its number."""
    return not words or not words[0][:1].isalpha()


def _told(box: Box, share: float, notes: Mapping[int, str]) -> str:
    """What is shown where the mouse rests on a box."""
    layers = list(box.layers[:_LAYERS_TOLD])
    if len(box.layers) > len(layers):
        layers.append(f"and {len(box.layers) - len(layers)} more layers")
    return "\n".join(
        [
            f"partition {box.partition}: {sized(box.memory)} of its memory,"
            f" {share:.1%} of all compute",
            *(notes[atom] for atom in box.atoms if atom in notes),
            "",
            *layers,
        ]
    )


def _lines(graph: LayerGraph, layout: Layout) -> str:
    most = max((link.size for link in graph.links), default=0) or 1
    # Those that cross lie over all others.
    routes = sorted(layout.routes, key=lambda route: route.is_crossing)
    return tag(
        "svg",
        *(_route(graph, route, most) for route in routes),
        width=number(layout.width),
        height=number(layout.height),
        aria_hidden="true",
    )


def _route(graph: LayerGraph, route: Route, most: int) -> str:
    size = sum(route.tensors.values())
    width = _THIN + (_THICK - _THIN) * math.sqrt(size / most)
    source = graph.boxes[route.links[0].source]
    kind = "crossing" if route.is_crossing else "link"
    if route.is_return:
        kind += " return"
    parts = [tag("title", text(_carried(graph, route)))]
    for line in route.lines:
        path = _rounded(line)
        parts.append(tag("path", d=path, class_="line", stroke_width=number(width)))
        parts.append(tag("path", d=path, class_="near"))
        parts.append(tag("path", d=_head(line), class_="head"))
    if route.is_crossing:
        x, y = map(number, route.label)
        parts.append(tag("text", sized(size), x=x, y=y))
    return tag("g", *parts, class_=f"{kind} p{source.partition}", data_bytes=size)


def _carried(graph: LayerGraph, route: Route) -> str:
    source = graph.boxes[route.links[0].source].name
    targets = ", ".join(graph.boxes[link.target].name for link in route.links)
    tensors = [f"{name}  {sized(size)}" for name, size in route.tensors.items()]
    total = sized(sum(route.tensors.values()))
    return "\n".join([f"{source} → {targets}: {total} a microbatch", *tensors])


def _rounded(points: Sequence[Point]) -> str:
    """A line with round corners; it ends where its arrow's head begins."""
    ends = [*points[:-1], _short_of(points[-2], points[-1])]
    parts = [f"M{number(ends[0][0])} {number(ends[0][1])}"]
    for before, corner, after in zip(ends, ends[1:], ends[2:], strict=False):
        radius = min(_CORNER, _length(before, corner) / 2, _length(corner, after) / 2)
        start, end = _toward(corner, before, radius), _toward(corner, after, radius)
        parts.append(f"L{number(start[0])} {number(start[1])}")
        parts.append(
            f"Q{number(corner[0])} {number(corner[1])}"
            f" {number(end[0])} {number(end[1])}"
        )
    parts.append(f"L{number(ends[-1][0])} {number(ends[-1][1])}")
    return "".join(parts)


def _head(points: Sequence[Point], length: float = 7.0, half: float = 3.6) -> str:
    (x0, y0), (x, y) = points[-2], points[-1]
    if x0 == x:
        back = y - math.copysign(length, y - y0)
        corners = [(x, y), (x - half, back), (x + half, back)]
    else:
        back = x - math.copysign(length, x - x0)
        corners = [(x, y), (back, y - half), (back, y + half)]
    return "M" + "L".join(f"{number(a)} {number(b)}" for a, b in corners) + "Z"


def _short_of(before: Point, end: Point) -> Point:
    return _toward(end, before, min(5.0, _length(before, end)))


def _toward(start: Point, end: Point, distance: float) -> Point:
    share = distance / (_length(start, end) or 1.0)
    return (
        start[0] + (end[0] - start[0]) * share,
        start[1] + (end[1] - start[1]) * share,
    )


def _length(one: Point, other: Point) -> float:
    return math.dist(one, other)


def _style(place: Rectangle) -> str:
    x, y, width, height = map(number, (place.x, place.y, place.width, place.height))
    return f"left:{x}px;top:{y}px;width:{width}px;height:{height}px"
