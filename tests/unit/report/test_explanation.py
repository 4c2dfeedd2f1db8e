"""Sentences about borders, against the figures that they quote."""

import dataclasses
import re

from smp_tf.plan.explain import Reason, borders
from smp_tf.report.explanation import consequence, explanation, notes, sentences
from smp_tf.report.markup import sized
from tests.unit.plan.example_graphs import chain, residual
from tests.unit.plan.example_problems import chain_flows, problem
from tests.unit.report.example_pages import planned


def said(given, chosen, side, briefly=False):
    (border,) = borders(given, chosen)
    return consequence(getattr(border, side), briefly)


def test_sentences_by_reason():
    given = problem([4, 4, 4, 4], 2, flows=chain_flows(10, 20, 10))
    fuller = "on 1, the fullest rank would hold 1.50 instead of 1.00 of an even share"
    fewer = "although only 10 B a microbatch would cross ranks instead of 20 B"
    assert said(given, [0, 0, 1, 1], "last") == f"{fuller}, {fewer}"
    assert said(given, [0, 0, 1, 1], "last", briefly=True) == fuller
    given = problem([8, 0, 8], 2, flows=chain_flows(5, 9))
    assert said(given, [0, 1, 1], "first") == (
        "on 0, 9 B a microbatch would cross ranks instead of 5 B"
    )
    assert said(given, [0, 1, 1], "last") == "partition 0 would be empty without it"
    flows = [(0, (1,), 6), (1, (2,), 4), (1, (2,), 2)]
    assert said(problem([8, 0, 8], 2, flows=flows), [0, 1, 1], "first") == (
        "on 0, 2 tensors a microbatch would cross ranks instead of 1"
    )
    given = problem([5, 4, 3], 2, memory_weight=0.0, memory_limit=8)
    assert said(given, [0, 1, 1], "first") == (
        "on 0, a rank would need 9 B, above the memory limit"
    )
    given = problem([1, 1, 1, 1], 2, flows=chain_flows(1, 1, 1))
    assert said(given, [0, 1, 1, 1], "first") == (
        "nothing speaks against it: on 0, the fullest rank would hold 1.00 instead of"
        " 1.50 of an even share"
    )
    given = problem([8, 0, 8], 2, flows=chain_flows(9, 9))
    assert said(given, [0, 1, 1], "first").startswith("either is as good")


def test_small_differences_are_told_with_more_digits():
    given = problem([10**6, 1, 10**6 - 1], 2)
    assert "1.000001 instead of 1.000000" in said(given, [0, 1, 1], "first")


def test_one_line_a_border():
    plan = planned(residual(6), 3)
    head, *lines = explanation(plan).splitlines()
    assert head == "why there" and len(lines) == 2
    for line, border in zip(lines, borders(plan.problem, plan.partition_of_atom)):
        assert line.startswith(f"{border.left} | {border.left + 1}: ")
        for move in (border.last, border.first):
            assert f"stays on {move.source}: {consequence(move, True)}" in line
            if move.reason is Reason.CUTS_MORE:
                assert sized(move.after.cut_bytes) in line
    assert explanation(planned(chain(3), 1)) == ""


def test_the_page_tells_of_the_next_borders_too():
    plan = planned(residual(6), 2)
    (border,) = borders(plan.problem, plan.partition_of_atom)
    found = sentences(plan, border)
    assert len(found) == len(border.moves)
    for (_, why), move in zip(found[2:], border.moves[2:]):
        assert re.match(rf"is {len(move.atoms)} atoms (earlier|later), ", why)


def test_notes_are_for_the_atoms_at_borders():
    plan = planned(chain(6), 3)
    edges = [
        move.atoms[0]
        for border in borders(plan.problem, plan.partition_of_atom)
        for move in (border.last, border.first)
    ]
    assert set(notes(plan)) == set(edges)
    assert notes(plan)[edges[0]].startswith("not on partition 1: ")


def test_pinned_layers_are_where_the_user_put_them():
    graph = chain(4)
    plan = planned(pinned(graph), 2, auto_partition=False, default_partition=0)
    assert explanation(plan).endswith("as smp.partition says")
    (border,) = borders(plan.problem, plan.partition_of_atom)
    assert sentences(plan, border) == [
        ("Both partitions", "were filled with smp.partition.")
    ]
    assert notes(plan) == {}


def pinned(graph):
    nodes = (
        (
            dataclasses.replace(node, pin=int(node.layer > "model/dense_1"))
            if node.layer
            else node
        )
        for node in graph.nodes
    )
    return dataclasses.replace(graph, nodes=tuple(nodes))
