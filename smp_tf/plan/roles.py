"""What kind of node each node of a step is: forward or backward, and where it may run.

========== =====================================================================
role       meaning
========== =====================================================================
free       costs nothing to make anywhere (constants, arguments, captures, what is
           computed from constants and argument shapes): copied into each segment
read       the value of a model variable that the step does not write, or a cast,
           transpose or other shape of it: made again by each segment of its owner,
           never stashed (a copy of the weights for every microbatch in flight)
everywhere changes state that is no model's (a metric, a counter): runs on every rank
placed     runs on exactly one partition
========== =====================================================================
"""

import dataclasses
from collections.abc import Mapping

from smp_tf.errors import PartitionError
from smp_tf.plan.graph import Graph, Node, node_of

_SHAPE_OPS = frozenset({"Shape", "ShapeN", "Size", "Rank"})

# They move the elements of one tensor and compute nothing.
_MOVES = frozenset(
    {"Cast", "Identity", "Reshape", "ExpandDims", "Squeeze", "Transpose", "Pack"}
)


@dataclasses.dataclass(frozen=True)
class Roles:
    """Sets of node names; a node that is in no other role is placed.

    Attributes:
        backward: nodes of the backward phase; all others are forward.
        variable_of_read: read node -> index of its variable.
    """

    free: frozenset[str]
    everywhere: frozenset[str]
    backward: frozenset[str]
    variable_of_read: Mapping[str, int]

    def is_placed(self, name: str) -> bool:
        return (
            name not in self.free
            and name not in self.everywhere
            and name not in self.variable_of_read
        )


def touched_variables(graph: Graph, node: Node) -> list[int]:
    """Variables whose resource ``node`` takes as an input."""
    return [
        graph.variable_of[name]
        for name in map(node_of, node.inputs)
        if name in graph.variable_of
    ]


def written_variables(graph: Graph, node: Node) -> set[int]:
    """Variables that ``node`` may change."""
    written = map(node_of, node.writes)
    return {graph.variable_of[name] for name in written if name in graph.variable_of}


def require_one_home(graph: Graph) -> None:
    """Refuse what would have to run on one partition and on all of them.

    Raises:
        PartitionError: an operation uses a variable of a model and changes another
            one; names them.
    """
    for node in graph.nodes:
        names = [
            graph.variables[i].name
            for i in touched_variables(graph, node)
            if graph.variables[i].in_model
        ]
        outside = _changed_outside(graph, node) if names else None
        if outside:
            changed = [
                (
                    graph.variables[graph.variable_of[name]].name
                    if name in graph.variable_of
                    else name
                )
                for name in sorted(outside)
            ]
            raise PartitionError(
                "one operation must not use a variable of a model, which one partition"
                " has, and change one that every rank has:"
                f" operation={node.name!r} ({node.op}) layer={node.layer!r}"
                f" uses={names[0]!r} changes={changed}; change it before or after the"
                " loop, or make it an attribute of the model"
            )


def assign_roles(graph: Graph) -> Roles:
    """Classify every node of ``graph``."""
    free = _free(graph)
    return Roles(
        free=free,
        everywhere=_everywhere(graph),
        backward=_backward(graph),
        variable_of_read=_reads(graph, free),
    )


def _backward(graph: Graph) -> frozenset[str]:
    """Gradient operations and what follows them, less what a loss needs.

    *Forward = ancestors of a loss* comes first: building the gradient of a While loop
    rewrites the forward loop, whose accumulators then carry backward marks; and the
    inner gradient of a second-order loss is part of the forward pass.
    """
    forward = graph.ancestors(graph.losses)
    backward: set[str] = set()
    for node in graph.nodes:
        if node.name in forward:
            continue
        if (
            node.is_gradient
            or any(node_of(tensor) in backward for tensor in node.inputs)
            or any(control in backward for control in node.controls)
        ):
            backward.add(node.name)
    return frozenset(backward)


def _free(graph: Graph) -> frozenset[str]:
    returned = {node_of(tensor) for tensor in graph.returns}
    arguments = {node_of(tensor) for tensor in graph.arguments}
    free = arguments | set(graph.captures)
    computed: set[str] = set()  # free and not itself an argument or a capture
    for node in graph.nodes:
        if node.name in free or node.is_stateful or node.controls:
            continue
        if node.name in returned:  # needs a place to be returned from
            continue
        sources = {node_of(tensor) for tensor in node.inputs}
        if sources <= computed or (node.op in _SHAPE_OPS and sources <= arguments):
            computed.add(node.name)
    return frozenset(free | computed)


def _everywhere(graph: Graph) -> frozenset[str]:
    """What changes a resource of the process: a metric, a counter, a generator."""
    return frozenset(node.name for node in graph.nodes if _changed_outside(graph, node))


def _changed_outside(graph: Graph, node: Node) -> set[str]:
    """Placeholders of what ``node`` changes that belongs to no model."""
    captures = set(graph.captures)
    of_models = {v.placeholder for v in graph.variables if v.in_model}
    return {
        name
        for name in map(node_of, node.writes)
        if name in captures and name not in of_models
    }


def _reads(graph: Graph, free: frozenset[str]) -> Mapping[str, int]:
    written = {
        index for node in graph.nodes for index in written_variables(graph, node)
    }
    returned = {node_of(tensor) for tensor in graph.returns}
    found: dict[str, int] = {}
    for node in graph.nodes:
        if node.name in returned:
            continue
        if node.op == "ReadVariableOp":
            for index in touched_variables(graph, node):
                if graph.variables[index].in_model and index not in written:
                    found[node.name] = index
        elif node.op in _MOVES:
            sources = set(map(node_of, node.inputs))
            owners = {found[name] for name in sources if name in found}
            if len(owners) == 1 and all(s in found or s in free for s in sources):
                found[node.name] = owners.pop()
    return found
