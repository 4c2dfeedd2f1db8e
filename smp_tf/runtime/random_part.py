"""What draws random numbers in the function of a segment, apart from all the rest.

With what draws them goes what their shapes and seeds are computed from: whole numbers.
What draws from anything else (a sample of what a layer gives) cannot be taken out.
"""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import graph_pb2

from smp_tf.errors import SmpError
from smp_tf.frontend.hooks import graphs

_DRAWS = re.compile(
    "Random|Multinomial|TruncatedNormal|StandardNormal|StatefulUniform|^Rng"
    "|NonDeterministicInts|StatelessShuffle|CandidateSampler"
)

Importer = Callable[
    [Callable[[str], bool], Mapping[str, tf.Tensor], Sequence[str]], list[tf.Tensor]
]
"""(whether a node belongs to a part, tensor of the function -> what stands for it here,
names of tensors that the part makes) -> those tensors, in the graph that is built."""


@dataclasses.dataclass(frozen=True)
class RandomPart:
    """A part of a function's graph that reads nothing of the rest.

    Attributes:
        nodes: names of its operations; empty if the function draws nothing.
        constants: tensors that they read and that are known already -> values.
        drawn: tensors that the rest reads.
    """

    nodes: frozenset[str]
    constants: Mapping[str, Any]
    drawn: tuple[tf.Tensor, ...]


def find_random_part(graph: Any, graph_def: Any) -> RandomPart:
    """Divide a function.

    Args:
        graph: its FuncGraph.
        graph_def: the same as a GraphDef.

    Raises:
        SmpError: what draws cannot be taken out; says which operation.
    """
    operations = graph.get_operations()
    library = library_of(graph_def)
    for node in graph_def.node:
        for inner in sorted(types_inside([node], library) - {node.op}):
            if _DRAWS.search(inner):
                raise SmpError(
                    f"{node.name} ({node.op}) draws random numbers ({inner}) inside of"
                    " a function, a branch or a loop"
                )
    nodes: set[str] = set()
    constants: dict[str, Any] = {}
    waiting = [each for each in operations if _DRAWS.search(each.type)]
    while waiting:
        operation = waiting.pop()
        if operation.name in nodes or operation.type == "Placeholder":
            continue
        _require_light(operation)
        nodes.add(operation.name)
        for tensor in operation.inputs:
            value = graphs.static_value(tensor)
            if value is None:
                waiting.append(tensor.op)
            else:
                constants[tensor.name] = value
        waiting += operation.control_inputs
    read = {
        tensor.name: tensor
        for operation in operations
        if operation.name not in nodes
        for tensor in operation.inputs
        if tensor.op.name in nodes
    }
    return RandomPart(frozenset(nodes), constants, tuple(read.values()))


def _require_light(operation: tf.Operation) -> None:
    if _DRAWS.search(operation.type) or operation.type == "Const":
        return
    for tensor in operation.outputs:
        if not (tensor.dtype.is_integer or tensor.dtype in (tf.bool, tf.resource)):
            raise SmpError(
                f"{operation.name} ({operation.type}) computes from what random numbers"
                " are drawn"
            )


def library_of(graph_def: Any) -> dict[str, Any]:
    """Name of a function -> its FunctionDef."""
    return {each.signature.name: each for each in graph_def.library.function}


def types_inside(nodes: Iterable[Any], library: Mapping[str, Any]) -> set[str]:
    """Types of the operations in NodeDefs and in all functions that they call."""
    nodes = list(nodes)
    for name in functions_inside(nodes, library):
        nodes += library[name].node_def
    return {node.op for node in nodes} - library.keys()


def functions_inside(nodes: Iterable[Any], library: Mapping[str, Any]) -> set[str]:
    """Names of the functions that NodeDefs call, that those call, and so on."""
    waiting, found = list(nodes), set[str]()
    while waiting:
        node = waiting.pop()
        called = {node.op}
        for value in node.attr.values():
            called |= {each.name for each in (value.func, *value.list.func)}
        for name in sorted(called & library.keys() - found):
            found.add(name)
            waiting += library[name].node_def
    return found


def importer(graph: Any, graph_def: Any) -> Importer:
    """What imports parts of a function, given twice as for ``find_random_part``."""
    outside = {placeholder.name: tensor for tensor, placeholder in graph.captures}

    def run(
        belongs: Callable[[str], bool],
        feeds: Mapping[str, tf.Tensor],
        wanted: Sequence[str],
    ) -> list[tf.Tensor]:
        here = tf.compat.v1.get_default_graph()
        part = graph_pb2.GraphDef(
            versions=graph_def.versions, library=graph_def.library
        )
        read: set[str] = set()
        for each in graph_def.node:
            if each.op == "Placeholder" or not belongs(each.name):
                continue
            node = part.node.add()
            node.CopyFrom(each)
            data = [name for name in each.input if not name.startswith("^")]
            read.update(name if ":" in name else f"{name}:0" for name in data)
            # What random numbers are drawn with is done before all the rest.
            after = [name for name in each.input if name.startswith("^")]
            node.input[:] = data + [name for name in after if belongs(name[1:])]
        given = {name: value for name, value in feeds.items() if name in read}
        for name in sorted(read & outside.keys() - given.keys()):
            given[name] = here.capture(outside[name])
        made = tf.graph_util.import_graph_def(part, given, list(wanted), name="")
        graphs.keep_functions(graph, here)
        return list(made)

    return run
