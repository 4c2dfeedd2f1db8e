"""Measured seconds against numbers worked out by hand."""

import dataclasses

import pytest

from smp_tf.config import resolve
from smp_tf.plan.atoms import Atom, Atoms
from smp_tf.plan.check import check
from smp_tf.plan.cost import Cost, atom_costs, node_seconds
from smp_tf.plan.forecast import forecast
from smp_tf.plan.graph import Graph
from smp_tf.plan.link import Link
from smp_tf.plan.plan_step import plan_step
from smp_tf.plan.profile import (
    Profile,
    Row,
    Times,
    apply_profile,
    group_atoms,
    layer_paths,
    measured_profile,
)
from smp_tf.plan.step_plan import StepPlan
from smp_tf.report.forecast_table import forecast_table
from smp_tf.report.profile_table import profile_table
from tests.unit.plan.example_graphs import Analysed, Builder, analyse, chain


def costs_of(step: Analysed) -> tuple[Cost, ...]:
    return atom_costs(step.graph, step.roles, step.atoms)


def measured(
    step: Analysed, forward: list[float], backward: list[float], groups=None
) -> Profile:
    groups = groups or range(len(step.atoms.atoms))
    return measured_profile(step.atoms, costs_of(step), groups, forward, backward)


def applied(profile: Profile, step: Analysed):
    return apply_profile(profile, step.graph, step.roles, step.atoms, costs_of(step))


def test_the_step_that_was_measured_gets_what_was_measured():
    step = analyse(chain(3))
    before = costs_of(step)
    after, _ = applied(measured(step, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]), step)
    assert [c.forward_seconds for c in after] == pytest.approx([1.0, 2.0, 3.0])
    assert [c.backward_seconds for c in after] == pytest.approx([4.0, 5.0, 6.0])
    for old, new in zip(before, after):
        share = old.input_gradient_seconds / old.backward_seconds
        assert new.input_gradient_seconds == pytest.approx(share * new.backward_seconds)
        assert (
            dataclasses.replace(
                new,
                forward_seconds=old.forward_seconds,
                input_gradient_seconds=old.input_gradient_seconds,
                weight_gradient_seconds=old.weight_gradient_seconds,
            )
            == old
        )  # bytes and flops stay


def test_nodes_add_up_to_their_atoms():
    step = analyse(chain(3))
    after, seconds = applied(measured(step, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0]), step)
    sums = {}
    for node in step.graph.nodes:
        if step.roles.is_placed(node.name):
            key = step.atoms.atom_of[node.name], node.name in step.roles.backward
            sums[key] = sums.get(key, 0.0) + seconds[node.name]
    for atom, cost in enumerate(after):
        assert sums[atom, False] == pytest.approx(cost.forward_seconds)
        assert sums[atom, True] == pytest.approx(cost.backward_seconds)
    first, second = (
        seconds[name] / node_seconds(step.graph, step.graph.by_name[name])
        for name in ("dense_1/matmul", "dense_1/tanh")
    )
    assert first == pytest.approx(second)  # in the same measure


def test_another_batch_is_scaled():
    """Twice the bytes of everything: twice the seconds."""
    step = analyse(chain(3))
    profile = measured(step, [1.0, 2.0, 3.0], [4.0, 5.0, 6.0])
    doubled = [
        dataclasses.replace(
            cost,
            forward_seconds=2 * cost.forward_seconds,
            input_gradient_seconds=2 * cost.input_gradient_seconds,
            weight_gradient_seconds=2 * cost.weight_gradient_seconds,
        )
        for cost in costs_of(step)
    ]
    after, _ = apply_profile(profile, step.graph, step.roles, step.atoms, doubled)
    assert [c.forward_seconds for c in after] == pytest.approx([2.0, 4.0, 6.0])
    assert [c.backward_seconds for c in after] == pytest.approx([8.0, 10.0, 12.0])


def test_a_longer_model_takes_the_whole_ratio():
    short, long = analyse(chain(2)), analyse(chain(4))
    ratio = 7.0
    estimates = costs_of(short)
    profile = measured(
        short,
        [ratio * c.forward_seconds for c in estimates],
        [ratio * c.backward_seconds for c in estimates],
    )
    assert profile.ratio == pytest.approx(ratio)
    after, seconds = applied(profile, long)
    for old, new in zip(costs_of(long), after, strict=True):
        assert new.seconds == pytest.approx(ratio * old.seconds)
    for node in long.graph.nodes:  # also of what no atom is charged for
        assert seconds[node.name] == pytest.approx(
            ratio * node_seconds(long.graph, node)
        )


def test_a_step_without_a_backward_measures_the_forward_only():
    step = analyse(chain(2))
    rows = tuple(
        Row(atom.layers, Times(1e-3, 5e-3), Times(0.0, 0.0))
        for atom in step.atoms.atoms
    )
    after, _ = applied(Profile(rows), step)
    for old, new in zip(costs_of(step), after, strict=True):
        assert new.backward_seconds == pytest.approx(5 * old.backward_seconds)


def named(*layers: tuple[str, ...]) -> tuple[Atoms, list[Cost]]:
    atoms = tuple(Atom(each, ()) for each in layers)
    return Atoms(atoms, {}, {}), [Cost(forward_seconds=1.0)] * len(layers)


def forward_of(profile: Profile, *layers: tuple[str, ...]) -> list[float]:
    atoms, costs = named(*layers)
    graph = Graph((), (), (), (), (), (), {})
    step = analyse(chain(1))
    after, _ = apply_profile(profile, graph, step.roles, atoms, costs)
    return [cost.forward_seconds for cost in after]


def row(measured_seconds: float, *layers: str, estimated: float = 1.0) -> Row:
    return Row(layers, Times(estimated, measured_seconds), Times(0.0, 0.0))


def test_equal_names_are_matched_in_order_or_together():
    profile = Profile((row(1, "m"), row(9, "m/a"), row(3, "m"), row(7, "m/b")))
    assert forward_of(profile, ("m",), ("m/a",), ("m",)) == [1, 9, 3]
    assert forward_of(profile, ("m",), ("m",), ("m",)) == [2, 2, 2]
    assert forward_of(profile, ("m/a", "m/b")) == [8]  # two atoms became one
    assert forward_of(profile, ("m/c",)) == [5]  # (1 + 9 + 3 + 7) / 4
    assert forward_of(profile, ()) == [5]


def test_what_has_no_estimate_gets_its_seconds():
    profile = Profile((row(4, "m/a", estimated=0.0), row(2, "m/b")))
    assert forward_of(profile, ("m/a",), ("m/b",)) == [4, 2]
    b = Builder()
    x = b.op("x", "X", b.argument("in"), shape=None, layer="m/a", is_stateful=True)
    b.returns.append(b.op("y", "Y", x, shape=None, layer="m/a", is_stateful=True))
    step = analyse(b.build())
    after, seconds = applied(profile, step)
    # The argument has a shape, so that x has an estimate and y has none.
    assert after[0].forward_seconds == pytest.approx(4)
    assert seconds["x"] + seconds["y"] == pytest.approx(4)


def test_groups_are_neighbours_of_equal_number():
    step = analyse(chain(5))
    assert group_atoms(step.graph, step.atoms) == (0, 1, 2, 3, 4)
    assert group_atoms(step.graph, step.atoms, most=2) == (0, 0, 0, 1, 1)
    assert group_atoms(step.graph, step.atoms, most=1) == (0,) * 5


def test_a_tensor_that_cannot_be_handed_on_keeps_its_neighbours_together():
    step = analyse(chain(4))
    b = Builder()
    made = b.op("made", "X", b.argument("in"), dtype="variant", is_stateful=True)
    b.op("used", "Y", made, is_stateful=True)
    graph = b.build()
    for ends, groups in (((1, 2), (0, 1, 1, 2)), ((3, 0), (0, 0, 0, 0))):
        atom_of = dict(zip(("made", "used"), ends))
        atoms = dataclasses.replace(step.atoms, atom_of=atom_of)
        assert group_atoms(graph, atoms) == groups


def test_a_group_shares_its_time_by_estimates():
    step = analyse(chain(3))
    costs = costs_of(step)
    profile = measured(step, [6.0, 1.0], [8.0, 2.0], groups=(0, 0, 1))
    first, second, third = profile.rows
    assert first.forward.measured + second.forward.measured == pytest.approx(6.0)
    assert first.backward.measured / second.backward.measured == pytest.approx(
        costs[0].backward_seconds / costs[1].backward_seconds
    )
    assert (third.forward.measured, third.backward.measured) == (1.0, 2.0)
    assert (profile.forward_seconds, profile.backward_seconds) == (7.0, 10.0)


def test_names_of_another_rank():
    profile = Profile((row(1, "m/dense_9"), row(2, "m/x"), row(3)))
    renamed = profile.renamed({"m/dense_9": "m/dense_10"})
    assert renamed == Profile((row(1, "m/dense_10"), row(3)))
    assert layer_paths(chain(2)) == ("model/dense_0", "model/dense_1")


# Whole steps.


def planned(layers: int, profile: Profile | None, **config: object) -> StepPlan:
    resolved = resolve({"partitions": 2, "microbatches": 2, **config}, 2)
    return plan_step(chain(layers), resolved, {}, {}, profile=profile)


def test_the_partition_follows_the_measurement():
    step = analyse(chain(4))
    even = planned(4, None, memory_weight=0.0)
    assert even.partition_of_atom == (0, 0, 1, 1)
    assert even.profile is None
    slow_first = measured(step, [9.0, 1.0, 1.0, 1.0], [9.0, 1.0, 1.0, 1.0])
    plan = planned(4, slow_first, memory_weight=0.0)
    assert plan.partition_of_atom == (0, 1, 1, 1)
    assert plan.profile is slow_first
    # Stages agree with the atoms: 9 and 3 forward, 3 and 9 backward.
    stages = [(s.kind.value, s.partition) for s in plan.segments.segments]
    seconds = [segment.seconds for segment in plan.segments.segments]
    assert stages == [("F", 0), ("F", 1), ("B", 1), ("B", 0)]
    assert seconds == pytest.approx([9.0, 3.0, 3.0, 9.0])
    # Rank 0 alone is busy for 2 x 9 + 2 x 9; rank 1 adds to it what cannot overlap.
    assert 36.0 <= plan.report.seconds <= 42.0


def test_a_slow_link_keeps_more_microbatches_on_the_way():
    """Stages of 65 ms and messages of 20 ms: without one more, rank 0 waits for each
    microbatch to come back."""
    step = analyse(chain(4))
    times = measured(step, [0.01] * 4, [0.0225] * 4)
    slow = Link(latency_seconds=0.02, bytes_per_second=1e9)
    links = {(0, 1): slow, (1, 0): slow}
    late = dataclasses.replace(times, links=links)
    fast, known = (
        planned(4, each, microbatches=16, memory_weight=0.0) for each in (times, late)
    )
    assert known.segments.links == links
    assert fast.report.peak_live == (2, 1)
    assert known.report.peak_live == (3, 1)
    assert known.report.seconds < 1.06 * fast.report.seconds
    # As the schedule for a fast link would fare on the slow one:
    unaware = check(fast.schedule, known.segments.pipeline(), 16)
    assert unaware.seconds > 1.06 * fast.report.seconds


def test_profiles_keep_their_links():
    links = {(0, 1): Link(0.02, 1e9), (1, 0): Link(0.02, 1e9)}
    profile = Profile((row(1, "m/a"),), links)
    assert profile.renamed({"m/a": "m/b"}).links == links
    assert (profile + Profile((row(2, "m/c"),))).links == links
    assert (Profile((row(2, "m/c"),)) + profile).links == links
    told = [line.split() for line in profile_table(profile).splitlines()[-2:]]
    assert told == [
        ["messages", "latency", "ms", "GB/s"],
        ["ranks", "0", "and", "1", "20.000", "1"],
    ]


def test_tables_say_that_it_was_measured():
    step = analyse(chain(2))
    profile = measured(step, [1e-3, 3e-3], [2e-3, 6e-3])
    assert "measured step by schedule" in forecast_table(
        forecast([planned(2, profile)])
    )
    assert "estimated step by schedule" in forecast_table(forecast([planned(2, None)]))
    lines = [line.split() for line in profile_table(profile).splitlines()]
    assert lines[1][:4] == ["model/dense_0", "1.000", "2.000", "25.0%"]
    assert lines[2][:4] == ["model/dense_1", "3.000", "6.000", "75.0%"]
    assert lines[3] == ["all", "4.000", "8.000"]
    assert profile_table(Profile((row(1),))).splitlines()[1].startswith("(operations")
    assert repr(profile) == (
        "Profile(atoms=2, forward_seconds=0.004, backward_seconds=0.008)"
    )
