"""What a step returns: which leaf is a tensor, which the gradient of a variable."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from smp_tf.frontend.hooks import Recorder


@dataclasses.dataclass(frozen=True)
class Leaf:
    """One leaf of the structure that a step returns.

    Attributes:
        components: positions of its tensors in the step's flat returns; several for a
            composite (IndexedSlices), none for None and for Python values.
        type_spec: how to put the components together again; None for a Python value.
        variable: the variable this is a gradient of, None for anything else. Set for a
            None gradient too, where its place in the list tells.
        value: the Python value of a leaf without tensors.
    """

    components: tuple[int, ...] = ()
    type_spec: tf.TypeSpec | None = None
    variable: tf.Variable | None = None
    value: Any = None


@dataclasses.dataclass(frozen=True)
class Returns:
    """``structure`` is what was returned, with a ``Leaf`` in place of each value."""

    structure: Any

    @property
    def leaves(self) -> list[Leaf]:
        return tf.nest.flatten(self.structure)


def describe_returns(
    result: Any, recorder: Recorder
) -> tuple[Returns, list[tf.Tensor]]:
    """Split a returned structure into its description and its flat tensors."""
    gradients = _gradient_tensors(recorder)
    flat: list[tf.Tensor] = []

    def describe(value: Any) -> Leaf:
        if isinstance(value, tf.Variable):
            value = tf.convert_to_tensor(value)
        if not tf.is_tensor(value):
            return Leaf(value=value)
        tensors = tf.nest.flatten(value, expand_composites=True)
        start = len(flat)
        flat.extend(tensors)
        return Leaf(
            components=tuple(range(start, len(flat))),
            type_spec=tf.type_spec_from_value(value),
            variable=_variable_of(value, gradients, recorder),
        )

    structure = tf.nest.map_structure(describe, result)
    return Returns(_place_missing_gradients(structure, recorder)), flat


def _gradient_tensors(recorder: Recorder) -> dict[str, tf.Variable]:
    found = {}
    for sources, results in recorder.gradients:
        for source, result in zip(sources, results, strict=True):
            if isinstance(source, tf.Variable) and result is not None:
                for tensor in tf.nest.flatten(result, expand_composites=True):
                    found[tensor.name] = source
    return found


def _variable_of(
    value: Any, gradients: dict[str, tf.Variable], recorder: Recorder
) -> tf.Variable | None:
    """The variable whose gradient ``value`` is, also after post-processing in the step.

    A gradient that was clipped or scaled is another tensor than the one the tape
    returned: the recorded gradient that is the fewest operations away wins, when there
    is only one and it has the variable's shape (a norm over all gradients has neither).
    """
    if not gradients:
        return None
    losses = {tensor.name for tensor in recorder.losses}
    shape = getattr(value, "shape", None)
    frontier = [getattr(value, "values", value)]
    seen: set[str] = set()
    while frontier:
        hits = {
            id(gradients[t.name]): gradients[t.name]
            for t in frontier
            if t.name in gradients
        }
        if hits:
            variable = next(iter(hits.values()))
            is_one = len(hits) == 1 and variable.shape.is_compatible_with(shape)
            return variable if is_one else None
        if any(tensor.name in losses for tensor in frontier):
            return None
        seen.update(tensor.name for tensor in frontier)
        reached = {t.name: t for tensor in frontier for t in tensor.op.inputs}
        frontier = [tensor for name, tensor in reached.items() if name not in seen]
    return None


def _place_missing_gradients(structure: Any, recorder: Recorder) -> Any:
    """Give the None gradients of unused variables their variable, by place in a list.

    A returned list is taken for the result of a gradient call when it is as long as the
    call's sources and no leaf contradicts.
    """
    if isinstance(structure, dict):
        return type(structure)(
            {
                key: _place_missing_gradients(value, recorder)
                for key, value in structure.items()
            }
        )
    if not isinstance(structure, (list, tuple)):
        return structure
    children = [_place_missing_gradients(child, recorder) for child in structure]
    sources = _matching_sources(children, recorder)
    if sources is not None:
        children = [
            dataclasses.replace(leaf, variable=source)
            for leaf, source in zip(children, sources, strict=True)
        ]
    if hasattr(structure, "_fields"):
        return type(structure)(*children)
    return type(structure)(children)


def _matching_sources(children: Sequence[Any], recorder: Recorder) -> list[Any] | None:
    if not all(isinstance(child, Leaf) for child in children):
        return None
    if not any(leaf.variable is not None for leaf in children):
        return None
    for sources, _ in recorder.gradients:
        if len(sources) == len(children) and all(
            leaf.variable is source if leaf.components else leaf.value is None
            for leaf, source in zip(children, sources, strict=True)
        ):
            return list(sources)
    return None
