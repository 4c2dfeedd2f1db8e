"""Steps as literals: small graphs with their backward pass, made without TensorFlow."""

import dataclasses
import functools
import random
from collections.abc import Mapping, Sequence

from smp_tf.plan.atoms import Atoms, find_atoms
from smp_tf.plan.graph import Graph, Node, TensorSpec, Variable
from smp_tf.plan.roles import Roles, assign_roles
from smp_tf.plan.segment import SegmentPlan, split_segments

BATCH, WIDTH = 4, 8
ROWS = (BATCH, WIDTH)
SQUARE = (WIDTH, WIDTH)


class Builder:
    """Collects nodes. Every method that adds one returns its first output tensor."""

    def __init__(self):
        self.nodes, self.variables = [], []
        self.arguments, self.captures = [], []
        self.losses, self.returns, self.effects = [], [], []
        self.gradient_of = {}

    def op(self, name, op, *inputs, shape=ROWS, dtype="float32", outputs=1, **more):
        specs = (TensorSpec(dtype, shape),) * outputs
        self.nodes.append(Node(name, op, inputs, more.pop("controls", ()), specs))
        self.nodes[-1] = dataclasses.replace(self.nodes[-1], **more)
        return f"{name}:0"

    def backward(self, name, op, *inputs, forward="", **more):
        """An operation made by differentiation; ``forward`` is a tensor or unknown."""
        forward = forward.rpartition(":")[0]
        return self.op(name, op, *inputs, forward=forward, is_gradient=True, **more)

    def argument(self, name, shape=ROWS):
        self.arguments.append(self.op(name, "Placeholder", shape=shape))
        return self.arguments[-1]

    def variable(self, name, shape=SQUARE, in_model=True, trainable=True):
        """The resource of a new variable; its index is its place among them."""
        resource = self.op(f"{name}/handle", "Placeholder", shape=(), dtype="resource")
        self.captures.append(f"{name}/handle")
        self.variables.append(
            Variable(
                f"{name}:0",
                TensorSpec("float32", shape),
                trainable,
                in_model,
                f"{name}/handle",
            )
        )
        return resource

    def read(self, name, resource, shape=SQUARE, layer=""):
        kind = "ReadVariableOp"
        return self.op(name, kind, resource, shape=shape, layer=layer, is_stateful=True)

    def write(self, name, op, resource, *inputs):
        """An operation that changes a variable and gives nothing."""
        more = {"outputs": 0, "is_stateful": True, "writes": (resource,)}
        self.op(name, op, resource, *inputs, **more)

    def gradient(self, tensor, index):
        self.gradient_of[tensor] = index
        self.returns.append(tensor)

    def build(self):
        return Graph(
            tuple(self.nodes),
            tuple(self.arguments),
            tuple(self.captures),
            tuple(self.variables),
            tuple(self.losses),
            tuple(self.returns),
            dict(self.gradient_of),
            tuple(self.effects),
        )

    # --- layers

    def dense(self, name, x, weight, layer=None):
        """tanh(x @ w) in a layer of that name; returns what its backward needs."""
        layer = f"model/{name}" if layer is None else layer
        w = self.read(f"{name}/read", weight, layer=layer)
        product = self.op(f"{name}/matmul", "MatMul", x, w, layer=layer)
        y = self.op(f"{name}/tanh", "Tanh", product, layer=layer)
        return y, (name, x, w, product, y)

    def dense_backward(self, saved, grad, needs_input=True):
        """(gradient of x or None, gradient of w)."""
        name, x, w, product, y = saved
        g = self.backward(f"grad/{name}/tanh", "TanhGrad", y, grad, forward=y)
        dw = self.backward(
            f"grad/{name}/dw", "MatMul", x, g, forward=product, shape=SQUARE
        )
        if not needs_input:
            return None, dw
        return self.backward(f"grad/{name}/dx", "MatMul", g, w, forward=product), dw

    def mean_loss(self, y, name="loss"):
        loss = self.op(name, "Mean", y, shape=())
        self.losses.append(loss)
        self.returns.append(loss)
        return loss, self.backward(f"grad/{name}", "Tile", y, forward=loss)


def chain(num_layers):
    """Dense layers one after the other, a loss, all gradients."""
    b = Builder()
    x, saved = b.argument("x"), []
    for i in range(num_layers):
        x, each = b.dense(f"dense_{i}", x, b.variable(f"w{i}"))
        saved.append(each)
    _, grad = b.mean_loss(x)
    for i in reversed(range(num_layers)):
        grad, dw = b.dense_backward(saved[i], grad, needs_input=i > 0)
        b.gradient(dw, i)
    return b.build()


def residual(num_blocks):
    """x = x + dense(x). The sums of gradients know no forward operation."""
    b = Builder()
    x, saved = b.argument("x"), []
    for i in range(num_blocks):
        y, each = b.dense(f"block_{i}", x, b.variable(f"w{i}"))
        x = b.op(f"add_{i}", "AddV2", x, y, layer="model")
        saved.append(each)
    _, grad = b.mean_loss(x)
    for i in reversed(range(num_blocks)):
        dx, dw = b.dense_backward(saved[i], grad, needs_input=i > 0)
        b.gradient(dw, i)
        if i:
            grad = b.backward(f"grad/sum_{i}", "AddN", grad, dx)
    return b.build()


def tied():
    """embed, dense, head; embed and head use one weight."""
    b = Builder()
    weight = b.variable("embedding")
    x = b.argument("x")
    w = b.read("embed/read", weight, layer="model/embed")
    e = b.op("embed/matmul", "MatMul", x, w, layer="model/embed")
    h, saved = b.dense("dense", e, b.variable("w"))
    w2 = b.read("head/read", weight, layer="model")
    y = b.op("head/matmul", "MatMul", h, w2, layer="model")
    _, grad = b.mean_loss(y)
    dw2 = b.backward("grad/head/dw", "MatMul", h, grad, forward=y, shape=SQUARE)
    dh = b.backward("grad/head/dx", "MatMul", grad, w2, forward=y)
    de, dw = b.dense_backward(saved, dh)
    dw1 = b.backward("grad/embed/dw", "MatMul", x, de, forward=e, shape=SQUARE)
    b.gradient(b.backward("grad/sum", "AddN", dw1, dw2, shape=SQUARE), 0)
    b.gradient(dw, 1)
    return b.build()


def used_twice():
    """shared, other, shared again; forward only."""
    b = Builder()
    weight = b.variable("shared")
    x, _ = b.dense("shared_a", b.argument("x"), weight, layer="model/shared")
    x, _ = b.dense("other", x, b.variable("other"))
    x, _ = b.dense("shared_b", x, weight, layer="model/shared")
    b.returns.append(x)
    return b.build()


def with_metric():
    """A chain of two whose loss is added to a metric on the way."""
    b = Builder()
    x, first = b.dense("dense_0", b.argument("x"), b.variable("w0"))
    y, second = b.dense("dense_1", x, b.variable("w1"))
    total = b.variable("total", (), in_model=False, trainable=False)
    loss, grad = b.mean_loss(y)
    b.write("metric/add", "AssignAddVariableOp", total, loss)
    b.op(
        "metric/read",
        "ReadVariableOp",
        total,
        shape=(),
        is_stateful=True,
        controls=("metric/add",),
    )
    b.effects += ["metric/add", "metric/read"]
    grad, dw = b.dense_backward(second, grad)
    b.gradient(dw, 1)
    b.gradient(b.dense_backward(first, grad, needs_input=False)[1], 0)
    return b.build()


def uncrossable(spec=TensorSpec("variant", ()), pins=(None, None)):
    """Two layers joined by a tensor that cannot be sent, then a third one."""
    b = Builder()
    x = b.argument("x")
    a = b.op(
        "a/list", "Stack", x, shape=spec.shape, dtype=spec.dtype, layer="m/a",
        pin=pins[0],
    )  # fmt: skip
    y = b.op("b/unstack", "Unstack", a, layer="m/b", pin=pins[1])
    y, _ = b.dense("c", y, b.variable("w"), layer="m/c")
    b.returns.append(y)
    return b.build()


def random_step(seed):
    """A random model: branches, skips, shared weights, constants, several losses."""
    chance = random.Random(seed)
    b = Builder()
    weights = [b.variable(f"w{i}") for i in range(chance.randint(1, 5))]
    scale = b.op("scale", "Const", shape=())
    half = b.op("half", "Mul", scale, scale, shape=())
    values = [b.argument("x"), b.argument("y")]
    saved = []
    for i in range(chance.randint(2, 9)):
        kind = chance.choice(["dense", "dense", "add", "scale", "twice"])
        picked = chance.choice(values[-4:])
        if kind == "dense":
            weight = chance.randrange(len(weights))
            y, each = b.dense(f"dense_{i}", picked, weights[weight])
            saved.append(("dense", i, [picked], y, (weight, each)))
        else:
            other = chance.choice(values) if kind == "add" else half
            y = b.op(f"{kind}_{i}", "AddV2", picked, other, layer=f"model/{kind}_{i}")
            sources = [picked, other] if kind == "add" else [picked]
            saved.append(("op", i, sources, y, None))
        values.append(y)
    outputs = {values[-1], chance.choice(values[2:])}
    grads = {}
    for k, y in enumerate(sorted(outputs)):
        _, grad = b.mean_loss(y, f"loss_{k}")
        grads.setdefault(y, []).append(grad)
    of_weight = {}
    for kind, i, sources, y, extra in reversed(saved):
        if y not in grads:
            continue
        grad = grads[y][0]
        if len(grads[y]) > 1:
            grad = b.backward(f"grad/sum_{i}", "AddN", *grads[y])
        if kind == "dense":
            weight, each = extra
            dx, dw = b.dense_backward(each, grad)
            of_weight.setdefault(weight, []).append(dw)
            grads.setdefault(sources[0], []).append(dx)
        else:
            for k, source in enumerate(sources):
                g = b.backward(f"grad/{i}_{k}", "Mul", grad, half, forward=y)
                grads.setdefault(source, []).append(g)
    for weight, parts in sorted(of_weight.items()):
        total = parts[0]
        if len(parts) > 1:
            total = b.backward(f"grad/w{weight}", "AddN", *parts, shape=SQUARE)
        b.gradient(total, weight)
    if chance.random() < 0.5:
        b.returns.append(values[-1])
    return b.build().without_dead_nodes()


@dataclasses.dataclass(frozen=True)
class Analysed:
    """A graph with its roles and atoms."""

    graph: Graph
    roles: Roles
    atoms: Atoms

    def atom_names(self) -> list[tuple[str, ...]]:
        return [atom.layers for atom in self.atoms.atoms]

    @functools.cache
    def by_layer(self) -> Mapping[str, int]:
        return {
            layer: i for i, atom in enumerate(self.atoms.atoms) for layer in atom.layers
        }

    def cut(
        self,
        partition_of_atom: Sequence[int],
        num_partitions=None,
        split_backward=False,
        links=None,
    ) -> SegmentPlan:
        num_partitions = num_partitions or max(partition_of_atom) + 1
        return split_segments(
            self.graph,
            self.roles,
            self.atoms,
            partition_of_atom,
            num_partitions,
            {},
            split_backward,
            links,
        )


def analyse(graph: Graph) -> Analysed:
    roles = assign_roles(graph)
    return Analysed(graph, roles, find_atoms(graph, roles))


def visits(plan: SegmentPlan) -> str:
    """``F0 F1 B1 B0``."""
    return " ".join(f"{s.kind.value}{s.partition}" for s in plan.segments)
