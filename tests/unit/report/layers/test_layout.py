"""Geometry of the picture: nothing lies over anything else."""

import itertools

import pytest

from smp_tf.report.layers.graph import layer_graph
from smp_tf.report.layers.layout import lay_out
from tests.unit.plan.example_graphs import chain, random_step, residual, tied
from tests.unit.report.example_pages import planned


def laid_out(step, partitions, **config):
    plan = planned(step, partitions, **config)
    graph = layer_graph(plan)
    return graph, lay_out(graph, partitions)


def inside(box, point, margin=0.5):
    x, y = point
    return (
        box.x + margin < x < box.right - margin
        and box.y + margin < y < box.bottom - margin
    )


def crosses(box, start, end):
    """Whether a horizontal or vertical line goes through a box."""
    (x0, x1), (y0, y1) = sorted((start[0], end[0])), sorted((start[1], end[1]))
    return (
        x0 < box.right - 0.5
        and x1 > box.x + 0.5
        and y0 < box.bottom - 0.5
        and y1 > box.y + 0.5
    )


def check(graph, layout):
    for one, other in itertools.combinations(layout.boxes, 2):
        apart = (
            one.right < other.x
            or other.right < one.x
            or one.bottom < other.y
            or other.bottom < one.y
        )
        assert apart
    for box, place in zip(graph.boxes, layout.boxes, strict=True):
        lane = layout.lanes[box.partition]
        assert lane.x <= place.x and place.right <= lane.right <= layout.width
        assert lane.y <= place.y and place.bottom <= lane.bottom <= layout.height
    for one, other in itertools.pairwise(layout.lanes):
        assert one.right < other.x
    drawn = [link for route in layout.routes for link in route.links]
    assert sorted(drawn, key=repr) == sorted(graph.links, key=repr)
    for route in layout.routes:
        for link, line in zip(route.links, route.lines, strict=True):
            check_line(layout, link, line)


def check_line(layout, link, line):
    source, target = layout.boxes[link.source], layout.boxes[link.target]
    assert on_edge(source, line[0]) and on_edge(target, line[-1])
    for start, end in itertools.pairwise(line):
        assert start[0] == end[0] or start[1] == end[1], "not at a right angle"
        assert 0 <= start[0] <= layout.width and 0 <= start[1] <= layout.height
        for i, box in enumerate(layout.boxes):
            assert not crosses(box, start, end), f"{link} runs through box {i}"


def on_edge(box, point):
    x, y = point
    beside = x in (box.x, box.right) and box.y <= y <= box.bottom
    return beside or (y in (box.y, box.bottom) and box.x <= x <= box.right)


def test_a_chain_is_straight():
    graph, layout = laid_out(chain(4), 1)
    assert len({box.x for box in layout.boxes}) == 1
    assert all(len(route.lines[0]) == 2 for route in layout.routes)
    check(graph, layout)


def test_a_skip_runs_beside_what_it_skips():
    graph, layout = laid_out(residual(3), 1)
    check(graph, layout)
    right = layout.boxes[0].right
    bent = [r for r in layout.routes if max(x for x, _ in r.lines[0]) > right]
    assert len(bent) == 2  # the first block's input is no layer's output
    assert len({max(x for x, _ in route.lines[0]) for route in bent}) == 1


def test_tied_weights_go_back_below_the_lanes():
    graph, layout = laid_out(tied(), 2)
    check(graph, layout)
    (back,) = [route for route in layout.routes if route.is_return]
    assert back.is_crossing
    assert max(y for _, y in back.lines[0]) > max(lane.bottom for lane in layout.lanes)


@pytest.mark.parametrize("partitions", [1, 2, 3, 4])
@pytest.mark.parametrize("step", [chain(8), residual(6)], ids=["chain", "residual"])
def test_lanes(step, partitions):
    check(*laid_out(step, partitions))


@pytest.mark.parametrize("contiguous", [True, False], ids=["contiguous", "any"])
@pytest.mark.parametrize("seed", range(60))
def test_random_models(seed, contiguous):
    step = random_step(seed)
    atoms = len(planned(step, 1).atoms.atoms)
    for partitions in range(1, min(atoms, 4) + 1):
        check(*laid_out(step, partitions, contiguous=contiguous))
