"""The names of variables in a checkpoint: the same for any layout of the job.

    model/encoder/kernel                        the path of attributes to a variable
    optimizer/_iterations                       what the optimizer has once
    optimizer/slot/_momentums/model/encoder/kernel   what it keeps for a variable

The path begins with the names given to ``tf.train.Checkpoint``. Of several paths to a
variable the shortest counts, then the first in the alphabet: nothing depends on where
the variables are, or on the order in which objects were made.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from smp_tf.errors import ConfigError
from smp_tf.frontend.hooks import optimizer_slots, tracking

SLOT = "slot"
GENERATOR = "_random_generator"  # of a Dropout and its like: Keras does not track it
_COUNTER = "save_counter"  # of tf.train.Checkpoint itself, which counts its own saves


@dataclasses.dataclass
class Contents:
    """What a ``tf.train.Checkpoint`` leads to.

    Attributes:
        variables: name -> variable.
        roots: the names given to the checkpoint.
        optimizers: path -> optimizer.
        models: path -> model that is partitioned by a step.
        iterators: path -> iterator of a dataset.
        unsaved: path -> why what is there cannot be saved.
    """

    variables: dict[str, Any] = dataclasses.field(default_factory=dict)
    roots: list[str] = dataclasses.field(default_factory=list)
    optimizers: dict[str, Any] = dataclasses.field(default_factory=dict)
    models: dict[str, Any] = dataclasses.field(default_factory=dict)
    iterators: dict[str, Any] = dataclasses.field(default_factory=dict)
    unsaved: dict[str, str] = dataclasses.field(default_factory=dict)

    def require_savable(self) -> None:
        """Raises:
        ConfigError: the checkpoint leads to what would be lost.
        """
        if self.unsaved:
            told = "; ".join(f"{path}: {why}" for path, why in self.unsaved.items())
            raise ConfigError(
                "a checkpoint has variables, with what optimizers keep for them, and"
                f" iterators: the rest cannot be saved: {told}; leave it out of"
                " tf.train.Checkpoint, and put into it the models of its optimizers"
            )


def names_of(checkpoint: Any) -> dict[str, Any]:
    """Name -> variable, for all that exist, also those of other partitions.

    Args:
        checkpoint: a ``tf.train.Checkpoint``.

    A variable of another partition is named, but has no value here:
    ``frontend.variables.owner_elsewhere``. Slots exist where their optimizer updates
    the variable.
    """
    return contents_of(checkpoint).variables


def contents_of(checkpoint: Any) -> Contents:
    """All that a ``tf.train.Checkpoint`` leads to."""
    found = Contents()
    names: dict[int, str] = {}
    for path, each in _walk(checkpoint):
        if "/" not in path:
            found.roots.append(path)
        if isinstance(each, tf.Variable):
            _add(found.variables, names, path, each)
        elif optimizer_slots.is_optimizer(each):
            found.optimizers[path] = each
        elif callable(getattr(each, "when_placed", None)):
            found.models[path] = each
        elif isinstance(each, tf.data.Iterator):
            found.iterators[path] = each
        elif tracking.has_own_state(each):
            found.unsaved[path] = f"a {type(each).__name__}"
    of_models = dict(found.variables)
    for path, optimizer in found.optimizers.items():
        others = optimizer_slots.slots_of_others(optimizer, [*of_models.values()])
        if others:
            found.unsaved[path] = (
                "an optimizer of variables that are not in the checkpoint:"
                f" {others[:3]}"
            )
        _add_optimizer(found.variables, names, path, optimizer, of_models)
    return found


def _walk(
    root: Any, skipped: tuple[str, ...] = (_COUNTER,), prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """(path, object) breadth first, each object once; nothing inside optimizers."""
    seen = {id(root)}
    level = [(prefix, root)]
    while level:
        following = []
        for path, parent in level:
            children = _children(parent)
            for name, child in sorted(children.items()):
                if id(child) in seen or (parent is root and name in skipped):
                    continue
                seen.add(id(child))
                child_path = f"{path}/{name}" if path else name
                yield child_path, child
                if not optimizer_slots.is_optimizer(child):
                    following.append((child_path, child))
        level = following


def _children(parent: Any) -> dict[str, Any]:
    if optimizer_slots.is_optimizer(parent):
        return optimizer_slots.children_of(parent)
    children = dict(tf.train.TrackableView.children(parent))
    generator = tracking.generator_of(parent)
    return children if generator is None else {**children, GENERATOR: generator}


def _add(
    variables: dict[str, Any], names: dict[int, str], path: str, variable: Any
) -> None:
    if id(variable.handle) not in names:  # wrapped in two ways, it is still one
        names[id(variable.handle)] = path
        variables[path] = variable


def _add_optimizer(
    variables: dict[str, Any],
    names: dict[int, str],
    path: str,
    optimizer: Any,
    of_models: dict[str, Any],
) -> None:
    every = list(of_models.items())
    slots = optimizer_slots.slots_of(optimizer, [variable for _, variable in every])
    for slot_name, index, slot in slots:
        name = f"{path}/{SLOT}/{slot_name}/{every[index][0]}"
        _add(variables, names, name, slot)
    lists = ("_variables", "base_optimizer", *optimizer_slots.lists_of(optimizer))
    for own_path, each in _walk(optimizer, lists, path):
        if isinstance(each, tf.Variable):
            _add(variables, names, own_path, each)


def root_of(name: str) -> str:
    """The name in ``tf.train.Checkpoint`` that a variable's name begins with."""
    return name.split("/", 1)[0]


def trained_names(contents: Contents) -> tuple[str, ...]:
    """Names of the variables that are trained, in the order of the whole models."""
    names = {id(each.handle): name for name, each in contents.variables.items()}
    every = [
        variable
        for model in contents.models.values()
        if model.built
        for variable in model.global_trainable_variables
    ]
    handles = dict.fromkeys(id(variable.handle) for variable in every)
    return tuple(names[handle] for handle in handles if handle in names)
