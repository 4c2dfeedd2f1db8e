"""Short names of atoms, that a person finds in the model."""

import os.path
import re
from collections.abc import Sequence

from smp_tf.plan.step_plan import StepPlan

_NAMES_SHOWN = 3
# They move or rename; what an atom computes is told by its other operations.
_QUIET = frozenset(
    "Identity Cast Const Shape Reshape Transpose StridedSlice Squeeze ExpandDims Pack"
    " StopGradient NoOp ReadVariableOp ResourceGather Range Fill Placeholder".split()
)


def atom_names(plan: StepPlan) -> tuple[str, ...]:
    """The layer's path without the model, and for what a block does between its layers,
    the operations: ``block_1 · add``."""
    layers = [layer for atom in plan.atoms.atoms for layer in atom.layers]
    composite = {layer.rpartition("/")[0] for layer in layers} | {
        layer for layer in layers if "/" not in layer
    }
    root = _common_root(layers)
    operations = _operations(plan)
    found = []
    for i, atom in enumerate(plan.atoms.atoms):
        if not atom.layers:
            found.append("(operations outside layers)")
            continue
        first = atom.layers[0]
        name = first.removeprefix(root) or first
        if first in composite and operations[i]:
            name += " · " + ", ".join(operations[i][:_NAMES_SHOWN])
        elif len(atom.layers) > 1:
            name += f" (+{len(atom.layers) - 1})"
        found.append(name)
    return tuple(found)


def _common_root(layers: Sequence[str]) -> str:
    """``"model/"``, or what else all layers but the model itself are in."""
    inner = [layer.split("/")[:-1] for layer in layers if "/" in layer]
    shared = os.path.commonprefix(inner)
    return "/".join([*shared, ""]) if shared else ""


def _operations(plan: StepPlan) -> list[list[str]]:
    """What each atom does in its first layer, without what only moves data."""
    found: list[dict[str, None]] = [{} for _ in plan.atoms.atoms]
    quiet: list[dict[str, None]] = [{} for _ in plan.atoms.atoms]
    for node in plan.graph.nodes:
        atom = plan.atoms.atom_of.get(node.name)
        if atom is None or node.name in plan.roles.backward:
            continue
        if plan.roles.is_placed(node.name) and (
            node.layer in plan.atoms.atoms[atom].layers[:1]
        ):
            kept = quiet if node.op in _QUIET else found
            kept[atom].setdefault(re.sub(r"V\d+$", "", node.op).lower())
    return [list(loud or silent) for loud, silent in zip(found, quiet, strict=True)]
