"""What a step returns: which leaf is a tensor, which the gradient of a variable."""

import copy
import dataclasses
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.frontend.hooks.recording import Recorder


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

    def describe(value: Any) -> Any:
        # Not tf.nest, which sorts the keys of a dict: names of variables, say, sort
        # otherwise on a rank where "dense_9" is called "dense_10".
        if isinstance(value, Mapping):
            return with_items(value, {k: describe(v) for k, v in value.items()})
        if is_pair(value):
            gradient, variable = value
            found = _variable_of(gradient, gradients, recorder)
            if gradient is None or found is variable:
                leaf = dataclasses.replace(describe(gradient), variable=variable)
                return leaf, Leaf(value=variable, variable=variable)
        if isinstance(value, (list, tuple)):
            return _with_children(value, [describe(child) for child in value])
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

    return Returns(_place_missing_gradients(describe(result), recorder)), flat


def is_pair(value: Any) -> bool:
    """True for what ``optimizer.compute_gradients`` lists: (gradient, variable)."""
    if type(value) is not tuple or len(value) != 2:
        return False
    gradient, variable = value
    if not isinstance(variable, tf.Variable) or isinstance(gradient, tf.Variable):
        return False
    return gradient is None or tf.is_tensor(gradient)


def with_items(mapping: Mapping[Any, Any], items: dict[Any, Any]) -> Any:
    """A mapping of the same kind: a defaultdict keeps its factory, say."""
    if not isinstance(mapping, MutableMapping):
        return type(mapping)(items)  # type: ignore[call-arg]
    made = copy.copy(mapping)
    for key, item in items.items():  # Hugging Face's outputs refuse ``update``
        made[key] = item
    return made


def _with_children(sequence: Any, children: list[Any]) -> Any:
    """A list, tuple or named tuple of the same kind."""
    kind = type(sequence)
    return kind(*children) if hasattr(sequence, "_fields") else kind(children)


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
    if not gradients or value is None:
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
    if isinstance(structure, Mapping):
        items = structure.items()
        return with_items(
            structure, {k: _place_missing_gradients(v, recorder) for k, v in items}
        )
    if not isinstance(structure, (list, tuple)):
        return structure
    children = [_place_missing_gradients(child, recorder) for child in structure]
    sources = _matching_sources(children, recorder)
    if sources is not None:
        children = [
            dataclasses.replace(leaf, variable=source) if _is_variable(source) else leaf
            for leaf, source in zip(children, sources, strict=True)
        ]
    return _with_children(structure, children)


def _is_variable(value: Any) -> bool:
    return isinstance(value, tf.Variable)


def _matching_sources(children: Sequence[Any], recorder: Recorder) -> list[Any] | None:
    if not all(isinstance(child, Leaf) for child in children):
        return None
    is_known = any(leaf.variable is not None for leaf in children)
    for sources, results in recorder.gradients:
        if not is_known and any(result is not None for result in results):
            continue
        if len(sources) == len(children) and all(
            leaf.variable is source if leaf.components else leaf.value is None
            for leaf, source in zip(children, sources, strict=True)
        ):
            return list(sources)
    return None
