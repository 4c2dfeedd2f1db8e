"""Graph: specs, walks, dead nodes, topological order, what ranks compare."""

import dataclasses

import pytest

from smp_tf.errors import TraceError
from smp_tf.plan.graph import Node, TensorSpec, sort_topologically
from tests.unit.plan.example_graphs import Builder, chain, random_step, with_metric


def renamed(graph, name):
    """The same graph with every node, layer and variable called otherwise."""

    def tensor(text):
        node, _, index = text.rpartition(":")
        return f"{name(node)}:{index}"

    return dataclasses.replace(
        graph,
        nodes=tuple(
            dataclasses.replace(
                node,
                name=name(node.name),
                inputs=tuple(map(tensor, node.inputs)),
                controls=tuple(map(name, node.controls)),
                layer="/".join(map(name, node.layer.split("/"))) if node.layer else "",
                forward=name(node.forward) if node.forward else "",
            )
            for node in graph.nodes
        ),
        arguments=tuple(map(tensor, graph.arguments)),
        captures=tuple(map(name, graph.captures)),
        variables=tuple(
            dataclasses.replace(v, name=name(v.name), placeholder=name(v.placeholder))
            for v in graph.variables
        ),
        losses=tuple(map(tensor, graph.losses)),
        returns=tuple(map(tensor, graph.returns)),
        gradient_of={tensor(t): i for t, i in graph.gradient_of.items()},
        effects=tuple(map(name, graph.effects)),
    )


@pytest.mark.parametrize(
    "spec, elements, size, crosses, text",
    [
        (TensorSpec("float32", (2, 3)), 6, 24, True, "float32[2, 3]"),
        (TensorSpec("bfloat16", (None, 5)), 5, 10, True, "bfloat16[?, 5]"),
        (TensorSpec("int64", ()), 1, 8, True, "int64[]"),
        (TensorSpec("bool", (0, 4)), 0, 0, True, "bool[0, 4]"),
        (TensorSpec("float32", None), 0, 0, False, "float32[?]"),
        (TensorSpec("variant", ()), 1, 0, False, "variant[]"),
        (TensorSpec("resource", ()), 1, 0, False, "resource[]"),
        (TensorSpec("string", (3,)), 3, 72, True, "string[3]"),
    ],
)
def test_specs(spec, elements, size, crosses, text):
    assert spec.num_elements == elements
    assert spec.num_bytes == size
    assert spec.can_cross is crosses
    assert str(spec) == text


def test_walks_follow_data_and_control_edges():
    graph = with_metric()
    assert graph.ancestors(["loss:0"]) == {
        "x", "dense_0/read", "dense_0/matmul", "dense_0/tanh", "w0/handle", "loss",
        "dense_1/read", "dense_1/matmul", "dense_1/tanh", "w1/handle",
    }  # fmt: skip
    assert "metric/add" in graph.needed_by(["metric/read"])
    assert [n.name for n in graph.consumers["loss"]] == ["metric/add"]
    assert [n.name for n in graph.consumers["dense_1/tanh"]] == [
        "loss", "grad/loss", "grad/dense_1/tanh",
    ]  # fmt: skip
    assert graph.variable_of == {"w0/handle": 0, "w1/handle": 1, "total/handle": 2}
    assert graph.spec("dense_0/read:0") == TensorSpec("float32", (8, 8))


def test_dead_nodes_are_dropped_but_no_placeholder():
    b = Builder()
    x, unused = b.argument("x"), b.argument("unused")
    b.variable("w")
    y = b.op("y", "Tanh", x)
    b.op("dead", "Tanh", y)
    b.op("print", "Print", y, outputs=0, is_stateful=True)
    b.returns, b.effects = [y], ["print"]
    graph = b.build().without_dead_nodes()
    assert [n.name for n in graph.nodes] == ["x", "unused", "w/handle", "y", "print"]
    assert graph.arguments == (x, unused)


def test_a_loss_that_is_dead_leaves_what_it_was_made_of():
    """Its gradient does not need its value, and what it needed is forward still."""
    b = Builder()
    x = b.argument("x")
    y = b.op("y", "Tanh", x, layer="model")
    squared = b.op("squared", "Square", y)
    b.losses.append(b.op("loss", "Mean", squared, y, shape=()))
    b.returns.append(b.backward("grad", "Mul", y, x))
    graph = b.build().without_dead_nodes()
    assert [n.name for n in graph.nodes] == ["x", "y", "grad"]
    assert graph.losses == ("y:0",)
    graph.fingerprint()


def test_topological_order_keeps_the_order_of_creation_where_it_can():
    nodes = chain(3).nodes
    assert sort_topologically(nodes) == nodes
    backwards = sort_topologically(reversed(nodes))
    place = {node.name: i for i, node in enumerate(backwards)}
    assert len(place) == len(nodes)
    for node in backwards:
        for tensor in node.inputs:
            assert place[tensor.rpartition(":")[0]] < place[node.name]


def test_topological_order_respects_controls_and_is_not_recursive():
    spec = (TensorSpec("float32", ()),)
    early = Node("early", "Op", (), (), spec)
    nodes = [Node("late", "Op", (), ("early",), spec), early]
    assert [n.name for n in sort_topologically(nodes)] == ["early", "late"]
    long = [
        Node(f"n{i}", "Op", (f"n{i + 1}:0",) if i < 20_000 else (), (), spec)
        for i in range(20_001)
    ]
    assert sort_topologically(long)[0].name == "n20000"


def test_cycles_are_named():
    spec = (TensorSpec("float32", ()),)
    nodes = [Node("a", "Op", ("b:0",), (), spec), Node("b", "Op", ("a:0",), (), spec)]
    with pytest.raises(TraceError, match="'a' and 'b' wait for each other"):
        sort_topologically(nodes)


@pytest.mark.parametrize("graph", [chain(3), with_metric(), random_step(3)])
def test_fingerprint_does_not_depend_on_names(graph):
    other = renamed(graph, lambda name: f"{name}_7" if name else name)
    assert other.to_text() != graph.to_text()
    assert other.fingerprint() == graph.fingerprint()


def changes():
    """(what, changed graph, start of the first row that differs) of with_metric()."""
    graph = with_metric()

    def node(name, **values):
        nodes = tuple(
            dataclasses.replace(n, **values) if n.name == name else n
            for n in graph.nodes
        )
        return dataclasses.replace(graph, nodes=nodes)

    def variable(index, **values):
        variables = list(graph.variables)
        variables[index] = dataclasses.replace(variables[index], **values)
        return dataclasses.replace(graph, variables=tuple(variables))

    wide = (TensorSpec("float32", (4, 9)),)
    tanh, dw = "operation 'dense_0/tanh'", "operation 'grad/dense_1/dw'"
    yield "op", node("dense_0/tanh", op="Relu"), tanh
    yield "input", node("dense_1/tanh", inputs=("x:0",)), "operation 'dense_1/tanh'"
    yield "shape", node("dense_0/tanh", outputs=wide), tanh
    yield "attributes", node("dense_0/tanh", digest="other"), tanh
    yield "pin", node("dense_0/tanh", pin=1), tanh
    yield "layer", node("dense_0/tanh", layer="model/dense_9"), tanh
    yield "forward", node("grad/dense_1/dw", forward="loss"), dw
    yield "gradient", node("loss", is_gradient=True), "operation 'loss'"
    yield "control", node("metric/read", controls=()), "operation 'metric/read'"
    yield "argument", node("x", outputs=wide), "argument 'x:0'"
    yield "dtype", variable(0, spec=TensorSpec("float16", (8, 8))), "variable 0 'w0:0'"
    yield "trainable", variable(1, trainable=False), "variable 1 'w1:0'"
    yield "owner", variable(2, in_model=True), "variable 2 'total:0'"
    returns = dataclasses.replace(graph, returns=graph.returns[::-1])
    yield "returns", returns, "returned values"
    yield "losses", dataclasses.replace(graph, losses=()), "returned values"


@pytest.mark.parametrize(
    "what, changed, first", [pytest.param(*each, id=each[0]) for each in changes()]
)
def test_fingerprint_depends_on_everything_else(what, changed, first):
    graph = with_metric()
    assert changed.fingerprint() != graph.fingerprint()
    different = [
        row for row, other in zip(changed.digests(), graph.digests()) if row != other
    ]
    assert different[0][0].startswith(first)


def test_text_names_operation_layer_and_forward():
    lines = chain(1).to_text().splitlines()
    assert lines[3] == (
        "dense_0/matmul = MatMul(x:0, dense_0/read:0) -> float32[4, 8] [model/dense_0]"
    )
    assert lines[-1].endswith("grad of dense_0/matmul")
    assert len(lines) == len(chain(1).nodes)
