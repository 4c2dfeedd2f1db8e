"""From the flat tensors of an emitted step to what the user's function returned."""

from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.frontend.returns import Leaf, Returns, with_items
from smp_tf.runtime.emit import Emitted
from smp_tf.runtime.step_output import StepOutput

_REMOTE = object()  # a gradient that another partition has


def sum_positions(
    returns: Returns, owner: Mapping[int, int], pp_rank: int
) -> frozenset[int]:
    """Positions in the graph's returns of the dense gradients of this rank's variables.

    Args:
        owner: id of a variable's handle -> partition.
    """
    return frozenset(
        leaf.components[0]
        for leaf in returns.leaves
        if leaf.variable is not None
        and isinstance(leaf.type_spec, tf.TensorSpec)
        and owner.get(id(leaf.variable.handle)) == pp_rank
    )


def _is_pair(structure: Any) -> bool:
    """True for (gradient, variable): it is left out of a list as a whole."""
    is_two = type(structure) is tuple and len(structure) == 2
    return (
        is_two
        and isinstance(structure[1], Leaf)
        and isinstance(structure[1].value, tf.Variable)
    )


class Results:
    """Puts StepOutputs into the structure that a step returns, on one rank.

    Gradients of variables that other partitions own are left out of lists and tuples,
    so that ``zip(gradients, model.trainable_variables)`` lines up; elsewhere None.
    """

    def __init__(
        self,
        returns: Returns,
        emitted: Emitted,
        owner: Mapping[int, int],
        pp_rank: int,
    ) -> None:
        self._returns, self._emitted = returns, emitted
        self._owner, self._pp_rank = owner, pp_rank

    def of(self, flat: Sequence[tf.Tensor]) -> Any:
        """The structure for the flat outputs of one call."""
        return self._or_none(self._returns.structure, flat)

    def _or_none(self, structure: Any, flat: Sequence[tf.Tensor]) -> Any:
        result = self._build(structure, flat)
        return None if result is _REMOTE else result

    def _build(self, structure: Any, flat: Sequence[tf.Tensor]) -> Any:
        if isinstance(structure, Leaf):
            return self._leaf(structure, flat)
        kind = type(structure)
        if isinstance(structure, Mapping):
            items = {k: self._or_none(v, flat) for k, v in structure.items()}
            return with_items(structure, items)
        if hasattr(structure, "_fields"):
            return kind(*(self._or_none(each, flat) for each in structure))
        children = [self._build(each, flat) for each in structure]
        if _is_pair(structure) and children[0] is _REMOTE:
            return _REMOTE
        return kind(child for child in children if child is not _REMOTE)

    def _leaf(self, leaf: Leaf, flat: Sequence[tf.Tensor]) -> Any:
        if leaf.variable is not None:
            owner = self._owner.get(id(leaf.variable.handle), self._pp_rank)
            if owner != self._pp_rank:
                return _REMOTE
        if not leaf.components:
            return leaf.value
        by_component = [self._emitted.returned[c] for c in leaf.components]
        outputs = [
            tf.nest.pack_sequence_as(
                leaf.type_spec, [flat[i] for i in positions], expand_composites=True
            )
            for positions in zip(*by_component, strict=True)
        ]
        total = self._emitted.summed.get(leaf.components[0])
        return StepOutput(outputs, None if total is None else flat[total])
