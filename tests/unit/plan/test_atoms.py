"""Atoms: what stays together, and where every other node goes."""

import dataclasses

import pytest

from smp_tf.errors import PartitionError
from smp_tf.plan.atoms import Atom, find_atoms, pinned_atoms
from smp_tf.plan.graph import TensorSpec, node_of
from smp_tf.plan.roles import assign_roles
from tests.unit.plan.example_graphs import (
    SQUARE,
    Builder,
    analyse,
    chain,
    random_step,
    residual,
    tied,
    uncrossable,
    used_twice,
    with_metric,
)


def test_one_atom_per_layer_call_in_order():
    step = analyse(chain(3))
    assert step.atom_names() == [(f"model/dense_{i}",) for i in range(3)]
    assert [atom.variables for atom in step.atoms.atoms] == [(0,), (1,), (2,)]
    assert all(atom.pin is None for atom in step.atoms.atoms)


@pytest.mark.parametrize("make", [chain, residual])
def test_backward_runs_where_its_forward_does(make):
    step = analyse(make(3))
    for node in step.graph.nodes:
        if node.forward:
            assert step.atoms.atom_of[node.name] == step.atoms.atom_of[node.forward]


def test_gradient_sums_go_to_the_earliest_of_their_inputs():
    """grad/sum_2 adds the loss gradient (last atom) and block_2's dx."""
    step = analyse(residual(3))
    of = step.atoms.atom_of
    assert of["grad/sum_2"] == of["block_2/tanh"]
    assert of["grad/sum_1"] == of["block_1/tanh"]


def test_a_tied_weight_joins_its_users():
    step = analyse(tied())
    assert step.atom_names() == [("model/embed", "model"), ("model/dense",)]
    assert step.atoms.atom_of_variable == {0: 0, 1: 1}
    assert step.atoms.atom_of["grad/sum"] == 0


def test_a_layer_used_twice_is_one_atom():
    step = analyse(used_twice())
    assert step.atom_names() == [("model/shared",), ("model/other",)]
    assert step.atoms.atom_of["shared_b/tanh"] == 0


@pytest.mark.parametrize(
    "spec", [TensorSpec("variant", ()), TensorSpec("float32", None)]
)
def test_what_cannot_be_sent_joins_its_ends(spec):
    assert analyse(uncrossable(spec)).atom_names() == [("m/a", "m/b"), ("m/c",)]
    known = TensorSpec("float32", (None, 8))
    assert analyse(uncrossable(known)).atom_names() == [("m/a",), ("m/b",), ("m/c",)]


def test_operations_outside_layers_follow_their_latest_input():
    b = Builder()
    weights = [b.variable(f"w{i}") for i in range(2)]
    x, _ = b.dense("d0", b.argument("x"), weights[0])
    x, _ = b.dense("d1", x, weights[1])
    labels = b.op("one_hot", "OneHot", b.argument("y"))
    loss = b.op("loss", "Xent", x, labels)
    penalty = b.op("penalty", "L2Loss", b.read("w0/read", weights[0]), shape=())
    b.returns += [b.op("sum", "Add", loss, penalty), b.op("alone", "Neg", "y:0")]
    of = analyse(b.build()).atoms.atom_of
    assert of["loss"] == of["one_hot"] == of["sum"] == 1
    assert of["penalty"] == of["w0/read"] == 0
    assert of["alone"] == 0


def test_an_unused_variable_and_one_that_only_the_loss_uses_have_an_owner():
    b = Builder()
    x, _ = b.dense("d0", b.argument("x"), b.variable("w0"))
    x, _ = b.dense("d1", x, b.variable("w1"))
    b.variable("unused")
    temperature = b.read("read", b.variable("temperature", ()), ())
    b.returns.append(b.op("loss", "Mul", x, temperature, shape=()))
    step = analyse(b.build())
    assert step.atoms.atom_of_variable == {0: 0, 1: 1, 2: 0, 3: 1}
    assert step.atoms.atom_of["loss"] == 1


def test_a_model_without_layers_is_cut_at_its_variables():
    b = Builder()
    x = b.argument("x")
    for i in range(3):
        w = b.read(f"read_{i}", b.variable(f"w{i}"), layer="model")
        x = b.op(f"matmul_{i}", "MatMul", x, w, layer="model")
        x = b.op(f"tanh_{i}", "Tanh", x, layer="model")
    b.returns.append(x)
    step = analyse(b.build())
    assert len(step.atoms.atoms) == 3
    assert [step.atoms.atom_of[f"tanh_{i}"] for i in range(3)] == [0, 1, 2]


@pytest.mark.parametrize("seed", range(40))
def test_every_node_has_a_place(seed):
    """Whatever the model: nothing stays unattributed, shared variables are together."""
    step = analyse(random_step(seed))
    for node in step.graph.nodes:
        everywhere = node.name in step.roles.everywhere
        assert (node.name in step.atoms.atom_of) == (
            node.name not in step.roles.free and not everywhere
        ), node.name
    assert set(step.atoms.atom_of_variable) == set(range(len(step.graph.variables)))
    for name, index in step.roles.variable_of_read.items():
        assert step.atoms.atom_of[name] == step.atoms.atom_of_variable[index]
    first_use = [
        min(
            step.graph.position[name]
            for name, atom in step.atoms.atom_of.items()
            if atom == i and step.graph.by_name[name].layer
        )
        for i in range(len(step.atoms.atoms))
        if step.atoms.atoms[i].layers
    ]
    assert first_use == sorted(first_use)


def test_atom_names_for_people():
    assert Atom((), ()).name == "(operations outside layers)"
    assert Atom(("m/a",), ()).name == "m/a"
    assert Atom(("m/a", "m/b", "m/c"), ()).name == "m/a (+2)"


# --- manual placement -----------------------------------------------------------------


def pinned(graph, pins, num_partitions=2, default=0):
    """``pins``: layer -> partition."""
    nodes = tuple(
        dataclasses.replace(node, pin=pins.get(node.layer)) if node.layer else node
        for node in graph.nodes
    )
    graph = dataclasses.replace(graph, nodes=nodes)
    return pinned_atoms(graph, assign_roles(graph), num_partitions, default)


def test_pins_decide_and_the_rest_takes_the_default():
    pins = {"model/dense_0": 2, "model/dense_2": 0}
    atoms = pinned(chain(3), pins, num_partitions=4, default=1)
    assert [atom.layers for atom in atoms.atoms] == [
        ("model/dense_2",), ("model/dense_1",), ("model/dense_0",), (),
    ]  # fmt: skip
    assert [atom.pin for atom in atoms.atoms] == [0, 1, 2, 3]
    assert atoms.atom_of_variable == {0: 2, 1: 1, 2: 0}
    assert atoms.atom_of["grad/dense_0/dw"] == 2
    # The default is for operations outside every smp.partition, but the loss runs where
    # the model's output is.
    assert atoms.atom_of["loss"] == 0


def test_a_conflict_names_variable_layers_and_partitions():
    with pytest.raises(PartitionError) as caught:
        pinned(tied(), {"model/embed": 0, "model": 1})
    for part in (
        "variable='embedding:0'",
        "partition 0: layer 'model/embed'",
        "partition 1: layer 'model'",
        "auto_partition",
    ):
        assert part in str(caught.value)
    pinned(tied(), {"model/embed": 1, "model": 1, "model/dense": 0})


@pytest.mark.parametrize("pin", [2, -1])
def test_a_pin_out_of_range_is_named(pin):
    with pytest.raises(PartitionError, match=rf"0\.\.1: partition={pin}.*dense_1"):
        pinned(chain(2), {"model/dense_1": pin})


def test_a_metric_has_no_atom():
    step = analyse(with_metric())
    assert "metric/add" not in step.atoms.atom_of
    assert 2 not in step.atoms.atom_of_variable
    assert find_atoms(step.graph, step.roles) == step.atoms


def test_a_gradient_made_from_constants_is_where_its_variable_is():
    """As that of a bias when the loss is a sum: no input of it runs anywhere."""
    b = Builder()
    x, saved = b.dense("first", b.argument("x"), b.variable("w0"))
    y, last = b.dense("last", x, b.variable("w1"))
    _, grad = b.mean_loss(y)
    ones = b.op("ones", "Const", shape=SQUARE)
    b.gradient(b.backward("grad/last", "Identity", ones, shape=SQUARE), 1)
    b.gradient(b.dense_backward(saved, grad, needs_input=False)[1], 0)
    graph = b.build()
    atoms = find_atoms(graph, assign_roles(graph))
    assert atoms.atom_of["grad/last"] == atoms.atom_of_variable[1] == 1


def test_a_layer_whose_results_are_not_used_goes_with_its_neighbour():
    """All that is left of it is the read of its weight: alone, a rank would idle."""
    b = Builder()
    x, saved = b.dense("one", b.argument("x"), b.variable("w0"))
    unread = b.read("side/read", b.variable("w1"), layer="model/side")
    b.effects.append(node_of(unread))
    y, _ = b.dense("two", x, b.variable("w2"))
    b.returns.append(y)
    atoms = analyse(b.build()).atoms
    assert [atom.layers for atom in atoms.atoms] == [
        ("model/one", "model/side"), ("model/two",),
    ]  # fmt: skip
    assert atoms.atom_of_variable == {0: 0, 1: 0, 2: 1}


def test_what_is_colocated_is_one_atom():
    graph = chain(4)
    anchor = "dense_1/matmul"
    nodes = tuple(
        dataclasses.replace(node, colocated=(anchor, "not there"))
        if node.name == "dense_3/tanh"
        else node
        for node in graph.nodes
    )
    atoms = analyse(dataclasses.replace(graph, nodes=nodes)).atoms
    assert [atom.layers for atom in atoms.atoms] == [
        ("model/dense_0",), ("model/dense_1", "model/dense_3"), ("model/dense_2",),
    ]  # fmt: skip
