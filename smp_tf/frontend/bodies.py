"""What loops, conditions and calls cost: the functions inside, and rounds of loops."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

import tensorflow as tf

from smp_tf.frontend.hooks import graphs
from smp_tf.plan.graph import Graph, Node, TensorSpec

_LOOPS = ("While", "StatelessWhile")
_UNKNOWN = 0


def specs_of(tensors: Sequence[tf.Tensor]) -> tuple[TensorSpec, ...]:
    """dtypes and static shapes."""
    return tuple(TensorSpec(t.dtype.name, shape_of(t.shape)) for t in tensors)


def shape_of(shape: tf.TensorShape) -> tuple[int | None, ...] | None:
    return None if shape.rank is None else tuple(shape.as_list())


def with_bodies(
    nodes: Iterable[Node], operations: Iterable[tf.Operation]
) -> list[Node]:
    """The nodes of a traced step, with what their operations call.

    The rounds of a gradient's loop are known when it runs; they are those of the loop
    that it differentiates.
    """
    operation_of = {operation.name: operation for operation in operations}
    found: dict[str, Node] = {}
    for node in nodes:
        operation = operation_of[node.name]
        bodies, rounds = _bodies(operation), _rounds(operation)
        found[node.name] = dataclasses.replace(node, bodies=bodies, rounds=rounds)
    return [_resolved(node, _longest(node, found)) for node in found.values()]


def _longest(node: Node, found: Mapping[str, Node]) -> int:
    forward = found.get(node.forward)
    return _most_rounds(forward) if forward is not None else 1


def _most_rounds(node: Node) -> int:
    inner = (each for body in node.bodies for each in body.nodes)
    return max([node.rounds, 1, *map(_most_rounds, inner)])


def _resolved(node: Node, rounds: int) -> Node:
    """With this many rounds in every loop of which they are not known."""
    if not node.bodies:
        return dataclasses.replace(node, rounds=1) if not node.rounds else node
    return dataclasses.replace(
        node,
        rounds=node.rounds or rounds,
        bodies=tuple(
            dataclasses.replace(
                body, nodes=tuple(_resolved(each, rounds) for each in body.nodes)
            )
            for body in node.bodies
        ),
    )


def _bodies(operation: tf.Operation) -> tuple[Graph, ...]:
    """Operations and shapes only."""
    called = graphs.functions_of(operation)
    if operation.type in _LOOPS:
        called.pop("cond", None)
    return tuple(
        Graph(
            tuple(
                Node(
                    name=each.name,
                    op=each.type,
                    inputs=tuple(tensor.name for tensor in each.inputs),
                    controls=(),
                    outputs=specs_of(each.outputs),
                    bodies=_bodies(each),
                    rounds=_rounds(each),
                )
                for each in function.get_operations()
            ),
            *((), (), (), (), ()),
            {},
        )
        for function in called.values()
    )


def _rounds(operation: tf.Operation) -> int:
    """Of a loop: how often ``counter < bound`` holds, where both are known.

    Keras loops over time steps and AutoGraph over ranges like this, counting by one.
    """
    if operation.type not in _LOOPS:
        return 1
    condition = graphs.functions_of(operation).get("cond")
    if condition is None:
        return _UNKNOWN
    position = {tensor.name: i for i, tensor in enumerate(condition.inputs)}

    def value(tensor: tf.Tensor) -> int | None:
        if tensor.name in position:
            tensor = operation.inputs[position[tensor.name]]
        known = graphs.static_value(tensor)
        return None if known is None or known.ndim else int(known)

    found = []
    for each in condition.get_operations():
        if each.type == "Less" and each.inputs[0].dtype.is_integer:
            counter, bound = map(value, each.inputs)
            if counter is not None and bound is not None and bound > counter:
                found.append(bound - counter)
    return min(found, default=_UNKNOWN)
