"""Boxes of a picture: which layers are drawn together, and what joins them."""

import dataclasses
import itertools

import pytest

from smp_tf.report.layers.graph import layer_graph
from smp_tf.report.layers.names import atom_names
from tests.unit.plan.example_graphs import chain, random_step, residual, tied
from tests.unit.report.example_pages import planned, renamed


def sources_of(graph):
    return {
        (graph.boxes[k.source].name, graph.boxes[k.target].name) for k in graph.links
    }


def test_a_box_for_each_layer_and_each_sum():
    plan = planned(residual(2), 2)
    assert atom_names(plan) == ("block_0", "model · add", "block_1", "model · add")
    graph = layer_graph(plan)
    assert [box.name for box in graph.boxes] == list(atom_names(plan))
    assert [(link.source, link.target) for link in graph.links] == [
        (0, 1),
        (1, 2),
        (1, 3),
        (2, 3),
    ]
    assert [link.tensors for link in graph.links][1] == (("add_0:0", 4 * 8 * 4),)


def test_tied_weights_lead_back():
    graph = layer_graph(planned(tied(), 2))
    assert [box.name for box in graph.boxes] == ["embed (+1)", "dense"]
    assert [(link.source, link.target) for link in graph.links] == [(0, 1), (1, 0)]


def test_neighbours_are_put_together_by_name():
    plan = planned(renamed(chain(12), "block_{}"), 2)
    names = {f"block_{i}": f"block_{i // 3}/layer_{i % 3}" for i in range(12)}
    plan = planned(renamed_by(plan.graph, names), 2)
    graph = layer_graph(plan, most=6)
    every = [f"block_{i // 3}" for i in range(12)]
    seams = set(zip(every, plan.partition_of_atom, strict=True))
    assert len(graph.boxes) == len(seams)
    for box in graph.boxes:
        assert box.name.startswith(every[box.atoms[0]])
        assert {every[a] for a in box.atoms} == {every[box.atoms[0]]}
    assert len(layer_graph(plan, most=12).boxes) == 12


def test_flat_names_are_put_together_by_their_words():
    names = {f"dense_{i}": f"conv{i // 4}_block{i % 4 // 2}_{i % 2}" for i in range(16)}
    plan = planned(renamed_by(chain(16), names), 2)
    shown = [box.name for box in layer_graph(plan, most=8).boxes]
    assert shown[:2] == ["conv0_block0", "conv0_block1"] and len(shown) == 8


def test_names_that_share_nothing_grow_alike():
    names = {f"dense_{i}": f"layer{i}" for i in range(32)}
    plan = planned(renamed_by(chain(32), names), 2)
    sizes = [len(box.atoms) for box in layer_graph(plan, most=10).boxes]
    assert len(sizes) <= 10 and max(sizes) <= 4
    assert "(+3)" in layer_graph(plan, most=10).boxes[0].name


def renamed_by(graph, names):
    """Layers by the name that ``chain`` gives them."""

    def layer(node):
        return f"model/{names[node.layer.rpartition('/')[2]]}" if node.layer else ""

    nodes = (dataclasses.replace(node, layer=layer(node)) for node in graph.nodes)
    return dataclasses.replace(graph, nodes=tuple(nodes))


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("most", [1, 3, 100])
def test_boxes_are_a_true_picture(seed, most):
    step = random_step(seed)
    plan = planned(step, min(2, len(planned(step, 1).atoms.atoms)))
    graph = layer_graph(plan, most)
    atoms = sorted(itertools.chain(*(box.atoms for box in graph.boxes)))
    assert atoms == list(range(len(plan.atoms.atoms)))
    for box in graph.boxes:
        assert {plan.partition_of_atom[a] for a in box.atoms} == {box.partition}
    memory = plan.problem.memory(plan.partition_of_atom)
    for partition, size in enumerate(memory):
        drawn = [box for box in graph.boxes if box.partition == partition]
        assert sum(box.memory for box in drawn) == size
    if len(graph.boxes) == len(atoms):
        back = [k for k in graph.links if k.source > k.target]
        again = [a for a in plan.atoms.atoms if len(a.layers) > 1]
        assert again or not back
