"""The model as few boxes: what a picture of a plan shows.

Up to ``MOST_BOXES`` there is a box for each atom. Above, neighbours of one partition
are put together by their layers' names, the deepest level first, until they are few
enough: ``block_3/attention/query`` with ``block_3/attention/key``, and in flat models
``conv2_block1_1_bn`` with ``conv2_block1_1_relu``.
"""

import copy
import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from smp_tf.plan.graph import node_of
from smp_tf.plan.step_plan import StepPlan
from smp_tf.report.layers.names import atom_names

MOST_BOXES = 100


@dataclasses.dataclass(frozen=True)
class Box:
    """Atoms of one partition that are drawn together.

    Attributes:
        layers: paths of all layers in it.
        memory: bytes that it adds to its rank: weights, gradients, optimizer state and
            the activations of all microbatches in flight.
        seconds: forward and backward of one microbatch.
    """

    name: str
    atoms: tuple[int, ...]
    partition: int
    layers: tuple[str, ...]
    memory: int
    seconds: float


@dataclasses.dataclass(frozen=True)
class Link:
    """Forward tensors from box ``source`` to box ``target``: (name, bytes of one
    microbatch)."""

    source: int
    target: int
    tensors: tuple[tuple[str, int], ...]

    @property
    def size(self) -> int:
        return sum(size for _, size in self.tensors)


@dataclasses.dataclass(frozen=True)
class LayerGraph:
    """Boxes in an order in which every link but the returns (tied weights) leads on."""

    boxes: tuple[Box, ...]
    links: tuple[Link, ...]


def layer_graph(plan: StepPlan, most: int = MOST_BOXES) -> LayerGraph:
    """Boxes and links of a plan."""
    tensors = _forward_tensors(plan)
    edges = sorted({edge for edge, _, _ in tensors})
    groups = _Groups(plan.partition_of_atom, edges)
    layers = [atom.layers[0] if atom.layers else "" for atom in plan.atoms.atoms]
    for depth, words in _levels(layers):
        if len(groups) <= most:
            break
        groups = groups.merged([_key(layer, depth, words) for layer in layers], most)
    names, members = atom_names(plan), groups.members()
    box_of = {atom: i for i, atoms in enumerate(members) for atom in atoms}
    between: dict[tuple[int, int], dict[str, int]] = {}
    for (source, reader), tensor, size in tensors:
        ends = box_of[source], box_of[reader]
        if ends[0] != ends[1]:
            between.setdefault(ends, {})[tensor] = size
    return LayerGraph(
        tuple(_box(plan, names, atoms) for atoms in members),
        tuple(
            Link(*ends, tuple(found.items())) for ends, found in sorted(between.items())
        ),
    )


def _forward_tensors(plan: StepPlan) -> list[tuple[tuple[int, int], str, int]]:
    """((atom, atom that reads), tensor, bytes) of what goes forward between atoms."""
    home, roles = plan.atoms.atom_of, plan.roles
    found: dict[tuple[tuple[int, int], str], int] = {}
    for node in plan.graph.nodes:
        reader = home.get(node.name)
        if reader is None or node.name in roles.backward or node.name in roles.free:
            continue
        for tensor in node.inputs:
            name = node_of(tensor)
            source = home.get(name, reader)
            if source != reader and name not in roles.free:
                found[(source, reader), tensor] = plan.graph.spec(tensor).num_bytes
    return [(edge, tensor, size) for (edge, tensor), size in found.items()]


def _box(plan: StepPlan, names: Sequence[str], atoms: tuple[int, ...]) -> Box:
    problem, piece = plan.problem, plan.piece_of_atom[atoms[0]]
    layers = [layer for i in atoms for layer in plan.atoms.atoms[i].layers]
    return Box(
        name=(
            names[atoms[0]] if len(atoms) == 1 else _together([names[i] for i in atoms])
        ),
        atoms=atoms,
        partition=plan.partition_of_atom[atoms[0]],
        layers=tuple(dict.fromkeys(layers)),
        memory=sum(
            problem.static_bytes[i]
            + problem.in_flight[piece] * problem.activation_bytes[i]
            for i in atoms
        ),
        seconds=sum(plan.costs[i].seconds for i in atoms),
    )


def _together(names: Sequence[str]) -> str:
    """The path that names share, whole words only; else the first and how many more."""
    paths = [name.partition(" · ")[0].partition(" (+")[0] for name in names]
    shared = paths[0]
    for path in paths[1:]:
        while shared and not f"{path}/".startswith((f"{shared}/", f"{shared}_")):
            cut = max(shared.rfind("/"), shared.rfind("_"))
            shared = shared[:cut] if cut > 0 else ""
    return shared or f"{paths[0]} (+{len(paths) - 1})"


def _levels(layers: Iterable[str]) -> Iterator[tuple[int, int]]:
    """(parts of a path, words of the last of them), finest first; no words for all."""
    paths = [layer.split("/") for layer in layers]
    for depth in range(max(map(len, paths)), 0, -1):
        words = [
            len(path[depth - 1].split("_")) for path in paths if len(path) >= depth
        ]
        for count in (0, *range(max(words) - 1, 0, -1)):
            yield depth, count


def _key(layer: str, depth: int, words: int) -> str:
    path = layer.split("/")[:depth]
    if words and len(path) == depth:
        path[-1] = "_".join(path[-1].split("_")[:words])
    return "/".join(path)


class _Groups:
    """Atoms that are put together along edges, so that no circle arises."""

    def __init__(
        self, partitions: Sequence[int], edges: Sequence[tuple[int, int]]
    ) -> None:
        self.partitions, self.edges = partitions, edges
        self.group = list(range(len(partitions)))
        self.after: dict[int, set[int]] = {i: set() for i in self.group}
        for source, reader in edges:
            if source < reader:  # else a second use of tied weights
                self.after[source].add(reader)

    def __len__(self) -> int:
        return len(self.after)

    def merged(self, keys: Sequence[str], most: int) -> "_Groups":
        """Neighbours with equal keys joined: all of them, for the parts of a model
        to look alike; but only down to ``most`` where too few groups would remain."""
        joined = copy.deepcopy(self)
        while joined._join_pairs(keys, 0):
            pass
        if 4 * len(joined) < most:
            joined = copy.deepcopy(self)
            while len(joined) > most and joined._join_pairs(keys, most):
                pass
        return joined

    def _join_pairs(self, keys: Sequence[str], enough: int) -> bool:
        """Join each group with one neighbour at most, so that all grow alike; chains
        first, so that branches remain. Returns whether there was anything to join."""
        used: set[int] = set()
        for only_chains in (True, False):
            if not only_chains and used:
                break
            waits = self._waits()
            for source, reader in self.edges:
                one, other = self.group[source], self.group[reader]
                if (
                    len(self) > enough
                    and source < reader
                    and one != other
                    and not used & {one, other}
                    and keys[source] == keys[reader]
                    and self.partitions[source] == self.partitions[reader]
                ):
                    is_chain = len(self.after[one]) == 1 == waits[other]
                    if is_chain if only_chains else not self._is_detour(one, other):
                        self._join(one, other)
                        used.add(one)
        return bool(used)

    def members(self) -> list[tuple[int, ...]]:
        """Atoms of each group, the groups in topological order."""
        found: dict[int, list[int]] = {}
        for atom, group in enumerate(self.group):
            found.setdefault(group, []).append(atom)
        waits = self._waits()
        ready = [group for group, count in waits.items() if not count]
        ordered = []
        while ready:
            ready.sort(key=lambda group: -found[group][0])
            group = ready.pop()
            ordered.append(tuple(found[group]))
            for other in self.after[group]:
                waits[other] -= 1
                if not waits[other]:
                    ready.append(other)
        return ordered

    def _waits(self) -> dict[int, int]:
        """Group -> how many groups it reads."""
        waits = {group: 0 for group in self.after}
        for others in self.after.values():
            for other in others:
                waits[other] += 1
        return waits

    def _is_detour(self, one: int, other: int) -> bool:
        """Whether a way leads from one to the other over a third group."""
        stack, seen = [g for g in self.after[one] if g != other], set[int]()
        while stack:
            group = stack.pop()
            if group == other:
                return True
            if group not in seen:
                seen.add(group)
                stack += self.after[group]
        return False

    def _join(self, one: int, other: int) -> None:
        self.group = [one if group == other else group for group in self.group]
        self.after[one] = (self.after[one] | self.after.pop(other)) - {one, other}
        for others in self.after.values():
            if other in others:
                others.remove(other)
                others.add(one)
        self.after[one].discard(one)
