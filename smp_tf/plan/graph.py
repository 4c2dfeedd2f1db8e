"""One traced step as plain data: the first of the two narrow waists of the library.

A ``Graph`` holds the forward pass, the loss and the backward pass of ONE microbatch. It
is made by ``frontend.trace`` and contains no TensorFlow object, so everything that
plans on it can be tested with literals.
"""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Set

from smp_tf.errors import TraceError

DTYPE_BYTES: Mapping[str, int] = {
    "bool": 1,
    "int8": 1,
    "uint8": 1,
    "int16": 2,
    "uint16": 2,
    "float16": 2,
    "bfloat16": 2,
    "int32": 4,
    "uint32": 4,
    "float32": 4,
    "int64": 8,
    "uint64": 8,
    "float64": 8,
    "complex64": 8,
    "complex128": 16,
    "string": 24,  # a guess: TensorFlow's own size of one, without long characters
}
"""Bytes per element of what can cross ranks; any other dtype stays on its rank."""


@dataclasses.dataclass(frozen=True, slots=True)
class TensorSpec:
    """dtype and static shape of a tensor; ``shape`` is None for an unknown rank."""

    dtype: str
    shape: tuple[int | None, ...] | None

    @property
    def num_elements(self) -> int:
        """Number of elements; an unknown dimension counts 1, an unknown shape 0."""
        if self.shape is None:
            return 0
        return math.prod(1 if dim is None else dim for dim in self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * DTYPE_BYTES.get(self.dtype, 0)

    @property
    def can_cross(self) -> bool:
        """True if a tensor like this can be sent to another rank."""
        return self.dtype in DTYPE_BYTES and self.shape is not None

    def __str__(self) -> str:
        if self.shape is None:
            return f"{self.dtype}[?]"
        dims = ", ".join("?" if dim is None else str(dim) for dim in self.shape)
        return f"{self.dtype}[{dims}]"


@dataclasses.dataclass(frozen=True, slots=True)
class Variable:
    """A variable that the step reads or writes.

    Attributes:
        placeholder: name of the node that stands for its resource in the graph; "" when
            the variable belongs to a model but this step does not touch it.
        in_model: True for variables of a DistributedModel (owned by one partition),
            False for all others (a metric's state, a user's counter: one per rank).
    """

    name: str
    spec: TensorSpec
    trainable: bool
    in_model: bool
    placeholder: str


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """One operation.

    Attributes:
        inputs: tensor names ``"node:index"``, in order.
        controls: names of nodes that must run before.
        layer: path of Keras layers it was created in, ``"model/block_0/dense"``;
            "" outside every DistributedModel.
        forward: for an operation made by differentiation, the forward node it belongs
            to; "" where tracing could not tell.
        is_gradient: made while differentiating (tape, tf.gradients).
        pin: partition asked for with ``smp.partition``, None when not.
        writes: those of its inputs whose resource it may change.
        colocated: nodes that must run where it runs (``tf.compat.v1.colocate_with``).
        digest: hash of the attributes, for comparing ranks.
        bodies: what it calls: a loop's body, the branches of a condition.
        rounds: of a loop, at most; 1 where that is not known before it runs.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    controls: tuple[str, ...]
    outputs: tuple[TensorSpec, ...]
    is_stateful: bool = False
    layer: str = ""
    forward: str = ""
    is_gradient: bool = False
    pin: int | None = None
    writes: tuple[str, ...] = ()
    colocated: tuple[str, ...] = ()
    digest: str = ""
    bodies: tuple["Graph", ...] = dataclasses.field(
        default=(), repr=False, compare=False
    )
    rounds: int = 1


def node_of(tensor: str) -> str:
    """``"dense/MatMul:0"`` -> ``"dense/MatMul"``."""
    return tensor.rpartition(":")[0]


@dataclasses.dataclass(frozen=True)
class Graph:
    """A traced step.

    Attributes:
        nodes: in topological order.
        arguments: names of the tensors the microbatch arrives in.
        captures: names of placeholder nodes for what the step reads from outside
            (variables, constants of the enclosing program).
        variables: all variables of the models, then the other ones that are read or
        written.
        losses: tensors that were differentiated.
        returns: tensors the step returns.
        gradient_of: gradient tensor, as differentiated and as returned -> index of its
            variable.
        effects: nodes that must run although nothing reads them (assignments, prints).
    """

    nodes: tuple[Node, ...]
    arguments: tuple[str, ...]
    captures: tuple[str, ...]
    variables: tuple[Variable, ...]
    losses: tuple[str, ...]
    returns: tuple[str, ...]
    gradient_of: Mapping[str, int]
    effects: tuple[str, ...] = ()

    @functools.cached_property
    def by_name(self) -> Mapping[str, Node]:
        return {node.name: node for node in self.nodes}

    @functools.cached_property
    def consumers(self) -> Mapping[str, tuple[Node, ...]]:
        """node name -> nodes that read one of its outputs, in topological order."""
        readers: dict[str, dict[str, Node]] = {node.name: {} for node in self.nodes}
        for node in self.nodes:
            for tensor in node.inputs:
                readers[node_of(tensor)][node.name] = node
        return {name: tuple(found.values()) for name, found in readers.items()}

    @functools.cached_property
    def variable_of(self) -> Mapping[str, int]:
        """placeholder node -> index of the variable it stands for."""
        return {v.placeholder: i for i, v in enumerate(self.variables) if v.placeholder}

    def spec(self, tensor: str) -> TensorSpec:
        name, _, index = tensor.rpartition(":")
        return self.by_name[name].outputs[int(index)]

    def ancestors(
        self, tensors: Iterable[str], *, with_controls: bool = True
    ) -> frozenset[str]:
        """Names of the nodes that ``tensors`` need, over data and control edges."""
        return self.needed_by(map(node_of, tensors), with_controls=with_controls)

    def needed_by(
        self, names: Iterable[str], *, with_controls: bool = True
    ) -> frozenset[str]:
        """``names`` and all nodes they need, over data and control edges."""
        found: set[str] = set()
        stack = list(names)
        while stack:
            name = stack.pop()
            if name in found:
                continue
            found.add(name)
            node = self.by_name[name]
            stack.extend(node_of(tensor) for tensor in node.inputs)
            if with_controls:
                stack.extend(node.controls)
        return frozenset(found)

    def without_dead_nodes(self) -> "Graph":
        """Only what the returns and the effects need, and the placeholders."""
        live = self.needed_by([*map(node_of, self.returns), *self.effects])
        live |= {node_of(tensor) for tensor in self.arguments} | set(self.captures)
        return dataclasses.replace(
            self,
            nodes=tuple(node for node in self.nodes if node.name in live),
            losses=tuple(self._live_before(self.losses, live)),
        )

    def _live_before(self, tensors: Iterable[str], live: Set[str]) -> Iterator[str]:
        """``tensors``, or what they were computed from where they are dead: a loss that
        is not returned often is, for its gradient does not need its value."""
        seen: set[str] = set()
        stack = list(tensors)[::-1]
        while stack:
            tensor = stack.pop()
            if tensor in seen:
                continue
            seen.add(tensor)
            if node_of(tensor) in live:
                yield tensor
            else:
                stack.extend(reversed(self.by_name[node_of(tensor)].inputs))

    @functools.cached_property
    def position(self) -> Mapping[str, int]:
        """node name -> place in topological order."""
        return {node.name: i for i, node in enumerate(self.nodes)}

    def order_of(self, tensor: str) -> tuple[int, int]:
        """A sort key for tensors that does not depend on names."""
        name, _, index = tensor.rpartition(":")
        return self.position[name], int(index)

    def digests(self) -> tuple[tuple[str, str], ...]:
        """(what, hash) of every node, argument and variable, for comparing ranks.

        Two ranks with equal hashes make equal plans and compute the same. Names count
        only by which are equal: a script that builds one more model on rank 0 gives its
        layers other automatic names there.
        """
        layers: dict[str, int] = {}
        for node in self.nodes:
            for path in itertools.accumulate(node.layer.split("/"), "{}/{}".format):
                layers.setdefault(path, len(layers))
        rows = [
            (
                f"variable {i} {v.name!r} {v.spec}",
                repr((v.spec, v.trainable, v.in_model)),
            )
            for i, v in enumerate(self.variables)
        ]
        rows += [(f"argument {t!r}", str(self.spec(t))) for t in self.arguments]
        for node in self.nodes:
            content = (
                node.op,
                [self.order_of(tensor) for tensor in node.inputs],
                sorted(self.position[control] for control in node.controls),
                list(map(str, node.outputs)),
                layers[node.layer],
                self.position.get(node.forward, -1),
                (node.is_gradient, node.pin, node.digest),
                self.variable_of.get(node.name, -1),
            )
            rows.append((f"operation {node.name!r} ({node.op})", repr(content)))
        ends = [
            list(map(self.order_of, tensors)) for tensors in (self.returns, self.losses)
        ]
        rows.append(("returned values", repr(ends)))
        return tuple((what, short_hash(text)) for what, text in rows)

    def fingerprint(self) -> str:
        """One hash over ``digests``."""
        return short_hash("\n".join(digest for _, digest in self.digests()))

    def to_text(self) -> str:
        """A dump for people: one line a node."""
        return "\n".join(
            f"{node.name} = {node.op}({', '.join(node.inputs)}) ->"
            f" {', '.join(map(str, node.outputs))}"
            + (f" [{node.layer}]" if node.layer else "")
            + (f" grad of {node.forward}" if node.forward else "")
            for node in self.nodes
        )


def short_hash(text: str) -> str:
    """16 hexadecimal digits, the same in every process."""
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()


def sort_topologically(nodes: Iterable[Node]) -> tuple[Node, ...]:
    """Order ``nodes`` so that each comes after what it reads and waits for.

    The order of creation is kept where the edges allow it. Creation order alone is not
    enough: TensorFlow adds accumulators to a forward While loop when its gradient is
    built.

    Raises:
        TraceError: the nodes form a cycle.
    """
    given = {node.name: node for node in nodes}
    state: dict[str, int] = {}  # 1 = on the stack, 2 = done
    ordered: list[Node] = []
    for root in given.values():
        stack: list[tuple[Node, bool]] = [(root, False)]
        while stack:
            node, is_expanded = stack.pop()
            if is_expanded:
                state[node.name] = 2
                ordered.append(node)
                continue
            if node.name in state:
                continue
            state[node.name] = 1
            stack.append((node, True))
            before = [node_of(t) for t in node.inputs] + list(node.controls)
            for name in reversed(before):
                if state.get(name) == 1:
                    raise TraceError(
                        f"a traced step must not contain a cycle: {name!r} and"
                        f" {node.name!r} wait for each other"
                    )
                if name not in state:
                    stack.append((given[name], False))
    return tuple(ordered)
