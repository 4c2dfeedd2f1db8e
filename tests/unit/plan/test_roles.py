"""Roles: which nodes are free, read, everywhere, backward."""

import dataclasses

import pytest

from smp_tf.errors import PartitionError
from smp_tf.plan.roles import (
    assign_roles,
    require_one_home,
    touched_variables,
    written_variables,
)
from tests.unit.plan.example_graphs import Builder, chain, tied, with_metric


def names(graph, *beginnings):
    return {n.name for n in graph.nodes if n.name.startswith(beginnings)}


def test_backward_is_what_differentiation_made_and_what_follows():
    graph = chain(2)
    assert assign_roles(graph).backward == names(graph, "grad/")
    b = Builder()
    y, saved = b.dense("d", b.argument("x"), b.variable("w"))
    _, grad = b.mean_loss(y)
    _, dw = b.dense_backward(saved, grad, needs_input=False)
    norm = b.op("norm", "L2Loss", dw, shape=())
    b.op("log", "Print", norm, outputs=0, is_stateful=True)
    b.op("done", "NoOp", outputs=0, controls=("log",))
    b.returns.append(b.op("after_loss", "Tanh", "loss:0", shape=()))
    found = assign_roles(b.build()).backward
    assert {"norm", "log", "done"} <= found
    assert "after_loss" not in found and "loss" not in found


def test_forward_is_whatever_a_loss_needs_also_with_a_mark():
    """A gradient penalty, or a While loop that was rewritten for its gradient."""
    b = Builder()
    y, saved = b.dense("d", b.argument("x"), b.variable("w"))
    b.losses.append(b.op("inner", "Mean", y, shape=()))
    inner = b.backward("grad/inner", "Tile", y, forward="inner:0")
    dx, _ = b.dense_backward(saved, inner)
    _, outer = b.mean_loss(dx, "penalty")
    b.returns.append(b.backward("grad/outer", "Mul", outer, dx))
    backward = assign_roles(b.build()).backward
    assert backward == {"grad/penalty", "grad/outer", "grad/d/dw"}


def test_without_losses_nothing_is_backward():
    graph = chain(2)
    forward = [n for n in graph.nodes if not n.is_gradient]
    graph = dataclasses.replace(
        graph, nodes=tuple(forward), losses=(), returns=("loss:0",), gradient_of={}
    )
    assert assign_roles(graph).backward == frozenset()


def test_reads_of_unwritten_model_variables_and_casts_of_them():
    b = Builder()
    b.variable("w")
    b.variable("metric", (), in_model=False)
    w = b.read("read", "w/handle:0")
    half = b.op("half", "Cast", w, dtype="float16")
    same = b.op("same", "Identity", half, dtype="float16")
    used = b.op("used", "Tanh", same, dtype="float16")
    cast = b.op("cast", "Cast", used)
    b.read("other", "metric/handle:0", ())
    b.returns += [used, cast]
    roles = assign_roles(b.build())
    assert roles.variable_of_read == {"read": 0, "half": 0, "same": 0}
    assert not roles.is_placed("half") and roles.is_placed("used")


def test_other_shapes_of_a_weight_are_read_again():
    """A transposed weight, kept, would be a copy of it for every microbatch."""
    b = Builder()
    x, free = b.argument("x"), b.op("axes", "Const", shape=(2,), dtype="int32")
    b.variable("v"), b.variable("w")
    v, w = b.read("read_v", "v/handle:0"), b.read("read_w", "w/handle:0")
    turned = b.op("turned", "Transpose", w, free)
    packed = b.op("packed", "Pack", turned)
    both = b.op("both", "Pack", v, w)
    mixed = b.op("mixed", "Pack", w, b.op("h", "Tanh", x))
    b.returns += [b.op(f"use_{t}", "Tanh", t) for t in (packed, both, mixed)]
    roles = assign_roles(b.build())
    reads = {"read_v": 0, "read_w": 1, "turned": 1, "packed": 1}
    assert roles.variable_of_read == reads


def test_a_variable_that_the_step_writes_is_not_read_again():
    """BatchNorm's moving average: a second read could see another value."""
    b = Builder()
    b.variable("mean")
    w = b.read("read", "mean/handle:0")
    b.write("write", "AssignVariableOp", "mean/handle:0", w)
    b.effects.append("write")
    roles = assign_roles(b.build())
    assert not roles.variable_of_read
    assert roles.is_placed("read") and roles.is_placed("write")


def test_a_returned_read_has_a_place():
    b = Builder()
    b.variable("w")
    b.returns.append(b.read("read", "w/handle:0"))
    assert assign_roles(b.build()).is_placed("read")


def test_free_nodes_are_constants_and_shapes_of_arguments():
    b = Builder()
    x = b.argument("x")
    one = b.op("one", "Const", shape=())
    two = b.op("two", "Add", one, one, shape=())
    shape = b.op("shape", "Shape", x, shape=(2,), dtype="int32")
    rows = b.op("rows", "StridedSlice", shape, one, shape=(), dtype="int32")
    y = b.op("y", "Mul", x, two)
    deep = b.op("deep", "Shape", y, shape=(2,), dtype="int32")
    b.op("random", "RandomUniform", shape, is_stateful=True)
    ordered = b.op("ordered", "Const", shape=(), controls=("y",))
    returned = b.op("returned", "Const", shape=())
    b.returns += [deep, ordered, returned, rows]
    b.captures.append(b.op("capture", "Placeholder").rpartition(":")[0])
    roles = assign_roles(b.build())
    assert roles.free == {"x", "one", "two", "shape", "capture"}
    for name in ("y", "deep", "random", "ordered", "returned", "rows"):
        assert roles.is_placed(name), name


def test_effects_on_what_is_no_models_run_everywhere():
    graph = with_metric()
    roles = assign_roles(graph)
    assert roles.everywhere == {"metric/add"}
    add = graph.by_name["metric/add"]
    assert touched_variables(graph, add) == [2]
    owned = dataclasses.replace(graph.variables[2], in_model=True)
    in_model = dataclasses.replace(graph, variables=(*graph.variables[:2], owned))
    assert assign_roles(in_model).everywhere == frozenset()


def loop(writes):
    """A loop that takes a weight and a counter of the script."""
    b = Builder()
    weight, count = b.variable("w"), b.variable("count", (), in_model=False)
    more = {"is_stateful": True, "layer": "model/rnn", "writes": writes}
    b.returns.append(b.op("loop", "While", b.argument("x"), weight, count, **more))
    b.read("read", weight)
    return b.build()


def test_a_loop_that_only_reads_runs_in_one_place():
    graph = loop(writes=())
    roles = assign_roles(graph)
    require_one_home(graph)
    assert roles.is_placed("loop") and roles.variable_of_read == {"read": 0}


def test_a_loop_that_writes_the_model_is_no_reader():
    graph = loop(writes=("w/handle:0",))
    roles = assign_roles(graph)
    require_one_home(graph)
    assert roles.is_placed("loop") and not roles.variable_of_read
    assert written_variables(graph, graph.by_name["loop"]) == {0}


def test_a_loop_cannot_be_on_one_partition_and_on_all():
    with pytest.raises(PartitionError) as caught:
        require_one_home(loop(writes=("count/handle:0",)))
    for part in ("operation='loop' (While)", "layer='model/rnn'", "uses='w:0'",
                 "changes=['count:0']", "attribute of the model"):  # fmt: skip
        assert part in str(caught.value)


def test_a_tied_weight_has_two_reads():
    assert assign_roles(tied()).variable_of_read == {
        "embed/read": 0, "head/read": 0, "dense/read": 1,
    }  # fmt: skip
