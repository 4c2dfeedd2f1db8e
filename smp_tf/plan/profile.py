"""Measured seconds in place of estimated ones.

A profile has a row for each atom of the step that was measured: its seconds, and what
the cost model had estimated for them. Another step of the same model (another batch,
loss or number of microbatches) keeps its own estimates and takes the ratio measured /
estimated. Its atoms are known by the paths of their layers:

    atom                                              ratio of
    the same layers, with as many rows as atoms       its own row, in order
    a layer of it is in some rows                     these rows together
    anything else                                     all rows together

So the step that was measured gets exactly what was measured, and all is in seconds of
this machine.
"""

import collections
import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from smp_tf.plan.atoms import Atom, Atoms
from smp_tf.plan.cost import Cost, node_seconds
from smp_tf.plan.graph import Graph, node_of
from smp_tf.plan.link import Links
from smp_tf.plan.roles import Roles

MOST_GROUPS = 64
"""Parts of a model that are measured by themselves; each costs two functions."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Seconds of one microbatch in one phase."""

    estimated: float
    measured: float

    def __add__(self, other: "Times") -> "Times":
        return Times(self.estimated + other.estimated, self.measured + other.measured)

    @property
    def ratio(self) -> float | None:
        """None where there is nothing to compare."""
        return self.measured / self.estimated if self.estimated > 0 else None


_NOTHING = Times(0.0, 0.0)


@dataclasses.dataclass(frozen=True)
class Row:
    """One atom; ``layers`` are their paths, in order of first use."""

    layers: tuple[str, ...]
    forward: Times
    backward: Times

    @property
    def both(self) -> Times:
        return self.forward + self.backward


@dataclasses.dataclass(frozen=True, repr=False)
class Profile:
    """What was measured. ``smp.profile_table`` shows it.

    Attributes:
        rows: in the order of the model.
        links: between the ranks of a job, which have to be there for it.
    """

    rows: tuple[Row, ...]
    links: Links = dataclasses.field(default_factory=dict)

    @property
    def forward_seconds(self) -> float:
        return sum(row.forward.measured for row in self.rows)

    @property
    def backward_seconds(self) -> float:
        return sum(row.backward.measured for row in self.rows)

    @functools.cached_property
    def ratio(self) -> float:
        """Measured / estimated of everything together."""
        found = sum((row.both for row in self.rows), _NOTHING).ratio
        return 1.0 if found is None else found

    def __add__(self, other: "Profile") -> "Profile":
        return Profile(self.rows + other.rows, {**other.links, **self.links})

    def __repr__(self) -> str:
        return (
            f"Profile(atoms={len(self.rows)},"
            f" forward_seconds={self.forward_seconds:.4g},"
            f" backward_seconds={self.backward_seconds:.4g})"
        )

    def renamed(self, names: Mapping[str, str]) -> "Profile":
        """With other paths of layers; rows of none of these layers are left out.

        Keras counts on in automatic names, so a layer is ``dense_9`` on one rank and
        ``dense_10`` on another: between ranks, layers are known by their place.
        """
        rows = []
        for row in self.rows:
            layers = tuple(names[each] for each in row.layers if each in names)
            if layers or not row.layers:
                rows.append(dataclasses.replace(row, layers=layers))
        return Profile(tuple(rows), self.links)


def layer_paths(graph: Graph) -> tuple[str, ...]:
    """Of all layers, in order of first use: the same places on every rank."""
    return tuple(dict.fromkeys(node.layer for node in graph.nodes if node.layer))


# --- from a measurement ---------------------------------------------------------------


def group_atoms(graph: Graph, atoms: Atoms, most: int = MOST_GROUPS) -> tuple[int, ...]:
    """The group of each atom: what is measured together, neighbours always.

    Groups have the same number of atoms, whatever they are estimated to cost: a layer
    that is much slower than its estimate has few neighbours to share its time with.
    Atoms stay together where a tensor between them cannot leave a function.
    """
    count = len(atoms.atoms)
    size = math.ceil(count / most)
    begins = [index % size == 0 for index in range(count)]
    for node in graph.nodes:
        reader = atoms.atom_of.get(node.name)
        for tensor in node.inputs:
            source = atoms.atom_of.get(node_of(tensor))
            if reader is None or source is None or graph.spec(tensor).can_cross:
                continue
            low, high = sorted((reader, source))
            begins[low + 1 : high + 1] = [False] * (high - low)
    return tuple(group - 1 for group in itertools.accumulate(begins))


def measured_profile(
    atoms: Atoms,
    costs: Sequence[Cost],
    group_of_atom: Sequence[int],
    forward: Sequence[float],
    backward: Sequence[float],
) -> Profile:
    """The profile of a step whose groups of atoms took so long.

    The time of a group is shared between its atoms by their estimates.

    Args:
        costs: estimates, one per atom.
        forward, backward: seconds of each group.
    """
    sizes = [0] * len(forward)
    whole = [Cost()] * len(forward)
    for cost, group in zip(costs, group_of_atom, strict=True):
        sizes[group] += 1
        whole[group] += cost
    return Profile(
        tuple(
            Row(
                atom.layers,
                _share(
                    cost.forward_seconds,
                    whole[group].forward_seconds,
                    sizes[group],
                    forward[group],
                ),
                _share(
                    cost.backward_seconds,
                    whole[group].backward_seconds,
                    sizes[group],
                    backward[group],
                ),
            )
            for atom, cost, group in zip(atoms.atoms, costs, group_of_atom, strict=True)
        )
    )


def _share(estimated: float, whole: float, size: int, measured: float) -> Times:
    part = estimated / whole if whole > 0 else 1 / size
    return Times(estimated, measured * part)


# --- to the costs of a step -----------------------------------------------------------


def apply_profile(
    profile: Profile, graph: Graph, roles: Roles, atoms: Atoms, costs: Sequence[Cost]
) -> tuple[tuple[Cost, ...], Mapping[str, float]]:
    """Costs with measured seconds, and the seconds of each node that add up to them.

    Args:
        costs: estimates, one per atom.

    Returns:
        The costs: the backward is split, as in the estimates, between what others wait
        for and what nobody does. And node -> seconds.
    """
    found = []
    for cost, row in zip(costs, _rows_of(profile, atoms.atoms), strict=True):
        estimated = cost.backward_seconds
        backward = _seconds(row.backward, estimated, profile.ratio)
        awaited = cost.input_gradient_seconds / estimated if estimated > 0 else 1.0
        found.append(
            dataclasses.replace(
                cost,
                forward_seconds=_seconds(
                    row.forward, cost.forward_seconds, profile.ratio
                ),
                input_gradient_seconds=backward * awaited,
                weight_gradient_seconds=backward * (1.0 - awaited),
            )
        )
    return tuple(found), _by_node(profile.ratio, graph, roles, atoms, found)


def _seconds(times: Times, estimated: float, otherwise: float) -> float:
    """
    Args:
        times: of the profile.
        estimated: of the step that is planned.
        otherwise: ratio where the profile says nothing.
    """
    if times.ratio is not None:
        return estimated * times.ratio
    return times.measured or estimated * otherwise


def _rows_of(profile: Profile, atoms: Sequence[Atom]) -> list[Row]:
    """For each atom its own row, or what the rows with its layers are together."""
    own: dict[tuple[str, ...], list[Row]] = {}
    of_layer: dict[str, dict[int, Row]] = {}
    for i, row in enumerate(profile.rows):
        own.setdefault(row.layers, []).append(row)
        for layer in row.layers:
            of_layer.setdefault(layer, {})[i] = row
    wanted = collections.Counter(atom.layers for atom in atoms)
    in_order = {
        layers: iter(rows)
        for layers, rows in own.items()
        if len(rows) == wanted[layers]
    }
    found = []
    for atom in atoms:
        if atom.layers in in_order:
            found.append(next(in_order[atom.layers]))
            continue
        rows: dict[int, Row] = {}
        for layer in atom.layers:
            rows.update(of_layer.get(layer, {}))
        found.append(
            Row(
                atom.layers,
                _pooled(row.forward for row in rows.values()),
                _pooled(row.backward for row in rows.values()),
            )
        )
    return found


def _pooled(times: Iterable[Times]) -> Times:
    found = sum(times, _NOTHING)
    return found if found.ratio is not None else _NOTHING


def _by_node(
    otherwise: float,
    graph: Graph,
    roles: Roles,
    atoms: Atoms,
    costs: Sequence[Cost],
) -> Mapping[str, float]:
    """Seconds of each node: its estimate, in the measure of its atom and phase. Nodes
    of no estimate at all share evenly what was measured.

    Args:
        costs: of each atom, measured.
    """
    seconds = {node.name: node_seconds(graph, node) for node in graph.nodes}
    members: dict[tuple[int, bool], list[str]] = {}
    for node in graph.nodes:
        if node.name in atoms.atom_of and roles.is_placed(node.name):
            key = atoms.atom_of[node.name], node.name in roles.backward
            members.setdefault(key, []).append(node.name)
    ratio: dict[tuple[int, bool], float] = {}
    for key, names in members.items():
        cost = costs[key[0]]
        measured = cost.backward_seconds if key[1] else cost.forward_seconds
        estimated = sum(seconds[name] for name in names)
        if estimated > 0:
            ratio[key] = measured / estimated
        else:
            seconds.update(dict.fromkeys(names, measured / len(names)))
            ratio[key] = 1.0
    found = {}
    for name, each in seconds.items():
        key = atoms.atom_of.get(name, -1), name in roles.backward
        found[name] = each * ratio.get(key, otherwise)
    return found
