"""The object graph of a plain TensorFlow checkpoint, from the names of its variables.

    model/encoder/kernel                            model ─ encoder ─ kernel
    optimizer/slot/_momentums/model/encoder/kernel  optimizer ─ _momentums ─ 3
    the root has model and optimizer, and also what the model has

So ``tf.train.Checkpoint(model=.., optimizer=..).restore`` reads it, and the model's
``load_weights``. Place 3 is that of the kernel among the trained variables, where a
Keras optimizer of one process has its slot.
"""

import dataclasses
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from tensorflow.core.protobuf import trackable_object_graph_pb2

from smp_tf.checkpoint.names import SLOT, root_of

KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"
"""Under which TensorFlow looks for the graph."""

SAVE_COUNTER = "save_counter"
"""Of ``tf.train.Checkpoint`` itself."""

_VALUE = "VARIABLE_VALUE"
_INNER = "inner_optimizer"  # of a LossScaleOptimizer
_COUNTER = "_iterations"  # of an optimizer that is not a legacy one


def key_of(name: str) -> str:
    """The name of a value in a plain checkpoint."""
    return f"{name}/.ATTRIBUTES/{_VALUE}"


def is_of_generator(name: str) -> bool:
    """Whether it is the state of a Keras layer's random generator, which plain Keras
    keeps out of checkpoints."""
    return "/_random_generator/" in f"/{name}/"


def is_slot(name: str, known: Collection[str]) -> bool:
    """Whether it is what an optimizer keeps for another of the known names."""
    return _slot_of(name, known) is not None


@dataclasses.dataclass(frozen=True)
class _Slot:
    optimizer: str
    name: str
    variable: str


def object_graph(names: Collection[str], trained: Sequence[str]) -> Any:
    """The TrackableObjectGraph of a checkpoint with these variables.

    Args:
        names: of ``names.names_of``.
        trained: those of trained variables, in the order of the whole model.
    """
    graph = _Graph()
    known, places = set(names), {name: i for i, name in enumerate(trained)}
    slots = {name: _slot_of(name, known) for name in sorted(names)}
    for name, slot in slots.items():
        if slot is None:
            graph.add_value(graph.node(name.split("/")), name)
    for name, slot in slots.items():
        if slot is not None:
            graph.add_slot(name, slot, places.get(slot.variable))
    models = {root_of(name) for name in trained}
    if len(models) == 1:
        graph.add_children_to_root(models.pop())
    return graph.proto


def _slot_of(name: str, known: Collection[str]) -> _Slot | None:
    optimizer, found, rest = name.partition(f"/{SLOT}/")
    slot, _, variable = rest.partition("/")
    return _Slot(optimizer, slot, variable) if found and variable in known else None


class _Graph:
    """A tree of names, with one edge more here and there."""

    def __init__(self) -> None:
        self.proto = trackable_object_graph_pb2.TrackableObjectGraph()
        self.proto.nodes.add()
        self._children: list[dict[str, int]] = [{}]

    def node(self, path: Iterable[str], start: int = 0) -> int:
        """The number of a node, that is made if it is not there."""
        at = start
        for name in path:
            if name not in self._children[at]:
                self.proto.nodes.add()
                self._children.append({})
                self._add_child(at, name, len(self._children) - 1)
            at = self._children[at][name]
        return at

    def _add_child(self, parent: int, name: str, child: int) -> None:
        self._children[parent][name] = child
        self.proto.nodes[parent].children.add(node_id=child, local_name=name)

    def add_value(self, node: int, name: str) -> None:
        self.proto.nodes[node].attributes.add(
            name=_VALUE, full_name=name, checkpoint_key=key_of(name)
        )

    def add_slot(self, name: str, slot: _Slot, place: int | None) -> None:
        """In the optimizer's list of slots of this name; a legacy one has no lists, and
        an edge with a name."""
        optimizer = self.node(slot.optimizer.split("/"))
        optimizer = self._children[optimizer].get(_INNER, optimizer)
        if _COUNTER in self._children[optimizer] and place is not None:
            self.add_value(self.node([slot.name, str(place)], optimizer), name)
            return
        node = self.node([f"{slot.name}/{slot.variable}"], optimizer)
        self.add_value(node, name)
        self.proto.nodes[optimizer].slot_variables.add(
            original_variable_node_id=self.node(slot.variable.split("/")),
            slot_name=slot.name,
            slot_variable_node_id=node,
        )

    def add_children_to_root(self, model: str) -> None:
        """The root is the model, too."""
        for name, child in dict(self._children[self.node([model])]).items():
            if name not in self._children[0]:
                self._add_child(0, name, child)
