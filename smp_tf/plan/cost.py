"""The cost model: bytes and seconds of each atom, from static shapes.

Unknown dimensions (a batch size that is only known at run time) count as 1: all atoms
are scaled alike, so the balance hardly depends on them.
"""

import dataclasses
from collections.abc import Iterator, Mapping

from smp_tf.plan.atoms import Atoms
from smp_tf.plan.graph import Graph, Node, TensorSpec, node_of
from smp_tf.plan.roles import Roles

# A roofline of one CPU core. Only their ratio matters to the partitioner: operations
# with fewer than ~10 flops per byte are bound by memory.
FLOPS_PER_SECOND = 5e10
BYTES_PER_SECOND = 5e9

OPTIMIZER_SLOTS = 2
"""Slots per trainable weight: Adam's. A step does not say which optimizer follows."""

_CONVOLUTIONS = frozenset({"Conv2D", "Conv3D", "DepthwiseConv2dNative"})
_MATMULS = frozenset({"MatMul", "BatchMatMul", "BatchMatMulV2", "BatchMatMulV3"})


@dataclasses.dataclass(frozen=True)
class Cost:
    """What one atom costs; bytes of one microbatch, seconds of one microbatch.

    Attributes:
        weight_bytes: all its variables.
        gradient_bytes: accumulated gradients of the trainable ones.
        optimizer_bytes: optimizer state.
        activation_bytes: tensors kept from its forward for its backward, for as many
            microbatches as its rank has in flight.
        late_activation_bytes: likewise, of a use after atoms that come later (the head
            of tied embeddings): its backward follows soon, so few of them are kept.
        input_gradient_seconds: of the backward that other atoms wait for.
        weight_gradient_seconds: of the rest, which only gives gradients of its own
            variables, so nobody else waits for it (Zero Bubble, arXiv 2401.10241).
    """

    weight_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    activation_bytes: int = 0
    late_activation_bytes: int = 0
    flops: int = 0
    forward_seconds: float = 0.0
    input_gradient_seconds: float = 0.0
    weight_gradient_seconds: float = 0.0

    @property
    def backward_seconds(self) -> float:
        return self.input_gradient_seconds + self.weight_gradient_seconds

    @property
    def memory_bytes(self) -> int:
        return (
            self.weight_bytes
            + self.gradient_bytes
            + self.optimizer_bytes
            + self.activation_bytes
            + self.late_activation_bytes
        )

    @property
    def seconds(self) -> float:
        return self.forward_seconds + self.backward_seconds

    def __add__(self, other: "Cost") -> "Cost":
        mine, theirs = dataclasses.astuple(self), dataclasses.astuple(other)
        return Cost(*(a + b for a, b in zip(mine, theirs, strict=True)))


def is_product(node: Node) -> bool:
    """Whether a node multiplies matrices, convolves or loops: what takes the time."""
    return (
        bool(node.bodies)
        or node.op in _MATMULS
        or node.op in _CONVOLUTIONS
        or any(each in node.op for each in ("BackpropInput", "BackpropFilter"))
    )


def node_flops(graph: Graph, node: Node) -> int:
    """Floating point operations of a node; else one per output element. Those of a
    loop are its body's times its rounds, those of a condition its longest branch's.

    Shapes: MatMul [m, k] x [k, n] = 2 m k n; a convolution 2 x filter x outputs /
    channels out, its gradients the same with the roles of input and output exchanged.
    """
    if node.bodies:
        return node.rounds * max(
            sum(node_flops(body, each) for each in _inner(body)) for body in node.bodies
        )
    elements = sum(spec.num_elements for spec in node.outputs)
    specs = [graph.spec(tensor) for tensor in node.inputs]
    if node.op in _MATMULS:
        out, a = node.outputs[0], specs[0]
        if out.shape and a.num_elements and out.shape[-1]:
            rows = out.num_elements // out.shape[-1]
            return 2 * out.num_elements * max(a.num_elements // max(rows, 1), 1)
    elif node.op in _CONVOLUTIONS:
        return _convolution_flops(node.outputs[0].num_elements, specs[1], node.op)
    elif node.op.endswith("BackpropInput") or node.op.endswith("BackpropInputV2"):
        return _convolution_flops(specs[-1].num_elements, specs[1], node.op)
    elif node.op.endswith("BackpropFilter") or node.op.endswith("BackpropFilterV2"):
        return _convolution_flops(specs[-1].num_elements, node.outputs[0], node.op)
    return elements


def _convolution_flops(outputs: int, kernel: TensorSpec, op: str) -> int:
    if not kernel.shape:
        return outputs
    channels_out = kernel.shape[-1] or 1
    if op.startswith("Depthwise"):
        channels_out *= kernel.shape[-2] or 1
    return 2 * outputs * max(kernel.num_elements // channels_out, 1)


def node_seconds(graph: Graph, node: Node) -> float:
    """Roofline estimate: arithmetic or memory traffic, whichever takes longer."""
    if node.bodies:
        return node.rounds * max(
            sum(node_seconds(body, each) for each in _inner(body))
            for body in node.bodies
        )
    moved = sum(spec.num_bytes for spec in node.outputs)
    moved += sum(graph.spec(tensor).num_bytes for tensor in node.inputs)
    return max(node_flops(graph, node) / FLOPS_PER_SECOND, moved / BYTES_PER_SECOND)


def _inner(body: Graph) -> Iterator[Node]:
    """What a function computes, without what it is given."""
    return (node for node in body.nodes if node.op not in ("Placeholder", "Const"))


def atom_costs(
    graph: Graph,
    roles: Roles,
    atoms: Atoms,
    optimizer_slots: float = OPTIMIZER_SLOTS,
) -> tuple[Cost, ...]:
    """The cost of each atom, forward and backward.

    Args:
        optimizer_slots: bytes of optimizer state per byte of a trained weight.
    """
    costs = [Cost() for _ in atoms.atoms]
    awaited = _awaited_by_others(graph, roles, atoms.atom_of)
    for node in graph.nodes:
        atom = atoms.atom_of.get(node.name)
        if atom is None or not roles.is_placed(node.name):
            continue
        flops, seconds = node_flops(graph, node), node_seconds(graph, node)
        if node.name not in roles.backward:
            costs[atom] += Cost(flops=flops, forward_seconds=seconds)
        elif node.name in awaited:
            costs[atom] += Cost(flops=flops, input_gradient_seconds=seconds)
        else:
            costs[atom] += Cost(flops=flops, weight_gradient_seconds=seconds)
    for index, atom in atoms.atom_of_variable.items():
        variable = graph.variables[index]
        size = variable.spec.num_bytes
        trained = size if variable.trainable else 0
        costs[atom] += Cost(size, trained, round(optimizer_slots * trained))
    late = _late_nodes(graph, roles, atoms.atom_of)
    for tensor, atom in _kept_tensors(graph, roles, atoms.atom_of).items():
        size = graph.spec(tensor).num_bytes
        if node_of(tensor) in late:
            costs[atom] += Cost(late_activation_bytes=size)
        else:
            costs[atom] += Cost(activation_bytes=size)
    return tuple(costs)


def _awaited_by_others(
    graph: Graph, roles: Roles, atom_of: Mapping[str, int]
) -> frozenset[str]:
    """Backward nodes that the backward of another atom needs, directly or not."""
    found: set[str] = set()
    for node in reversed(graph.nodes):
        if node.name not in roles.backward:
            continue
        here = atom_of.get(node.name)
        for name in map(node_of, node.inputs):
            if name in roles.backward and (
                node.name in found or atom_of.get(name, here) != here
            ):
                found.add(name)
    return frozenset(found)


def _late_nodes(
    graph: Graph, roles: Roles, atom_of: Mapping[str, int]
) -> frozenset[str]:
    """Forward nodes of an atom that need what a later atom has made."""
    late: set[str] = set()
    for node in graph.nodes:
        here = atom_of.get(node.name)
        if here is None or node.name in roles.backward:
            continue
        for name in map(node_of, node.inputs):
            there = atom_of.get(name, here)
            if there > here or (there == here and name in late):
                late.add(node.name)
    return frozenset(late)


def _kept_tensors(
    graph: Graph, roles: Roles, atom_of: Mapping[str, int]
) -> Mapping[str, int]:
    """Forward tensor that is kept for the backward -> atom that it is counted for.

    A tensor that the backward of several atoms reads (a ReLU's output: by its own
    gradient and by that of the next layer's weight) counts once, for the first of them:
    neighbours are mostly on one rank, which keeps it once.
    """
    kept: dict[str, int] = {}
    for node in graph.nodes:
        if node.name not in roles.backward or node.name not in atom_of:
            continue
        for tensor in node.inputs:
            source = node_of(tensor)
            if source not in roles.backward and roles.is_placed(source):
                atom = atom_of[node.name]
                kept[tensor] = min(kept.get(tensor, atom), atom)
    return kept
