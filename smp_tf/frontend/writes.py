"""Which resources an operation may change, itself or in the functions that it calls.

``tf.while_loop`` and ``tf.cond`` take the variables they use as inputs, read or written
alike; only the bodies tell. A loop that only reads a model's weights must not count as
writing them: they would be stashed for the backward pass instead of read again.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tensorflow as tf

_READS = frozenset(
    {
        "LookupTableFindV2",
        "LookupTableSizeV2",
        "ReadVariableOp",
        "ResourceGather",
        "ResourceGatherNd",
        "VariableShape",
        "VarIsInitializedOp",
    }
)


class Writes:
    """Looks into the library of one graph.

    Args:
        library: the FunctionDefs of a GraphDef.
        is_stateful: of an operation's type.
    """

    def __init__(self, library: Any, is_stateful: Callable[[str], bool]) -> None:
        self._functions = {f.signature.name: f for f in library.function}
        self._is_stateful = is_stateful
        self._known: dict[str, frozenset[int]] = {}

    def of_operation(self, operation: tf.Operation, node_def: Any) -> tuple[str, ...]:
        """Names of the input tensors whose resource may be changed."""
        resources = [
            i for i, t in enumerate(operation.inputs) if t.dtype == tf.resource
        ]
        if not resources or operation.type in _READS:
            return ()
        written = self._written(node_def, len(operation.inputs), resources)
        return tuple(operation.inputs[i].name for i in sorted(written))

    def _written(
        self, node_def: Any, num_inputs: int, resources: Iterable[int]
    ) -> set[int]:
        """Of the inputs ``resources``, which may change."""
        if node_def.op in _READS or not self._is_stateful(node_def.op):
            return set()
        called = _called(node_def)
        if not called:
            return set(resources)
        found: set[int] = set()
        for name in called:
            if name not in self._functions:
                return set(resources)
            # A branch index or a condition comes before what the function takes.
            arguments = self._functions[name].signature.input_arg
            offset = num_inputs - len(arguments)
            found |= {offset + i for i in self._of_function(name)}
        return found & set(resources)

    def _of_function(self, name: str) -> frozenset[int]:
        """Positions of the arguments whose resource the function may change."""
        if name not in self._known:
            self._known[name] = frozenset()  # for a function that calls itself
            self._known[name] = self._find(self._functions[name])
        return self._known[name]

    def _find(self, function: Any) -> frozenset[int]:
        arguments = function.signature.input_arg
        position: dict[str, int] = {
            argument.name: i
            for i, argument in enumerate(arguments)
            if argument.type == tf.resource.as_datatype_enum
        }
        found: set[int] = set()
        for node_def in function.node_def:  # in an order in which data flows
            data = [name for name in node_def.input if not name.startswith("^")]
            sources = [name.partition(":")[0] for name in data]
            resources = [i for i, name in enumerate(sources) if name in position]
            if node_def.op == "Identity" and resources:
                position[node_def.name] = position[sources[0]]
            for i in self._written(node_def, len(data), resources):
                found.add(position[sources[i]])
        return frozenset(found)


def _called(node_def: Any) -> list[str]:
    attributes: Mapping[str, Any] = node_def.attr
    return [
        function.name
        for value in attributes.values()
        for function in ([value.func] if value.HasField("func") else value.list.func)
    ]
