"""Group the nodes of a step into atoms: what a partitioner may not tear apart.

An atom is one call of a Keras layer that has no layers inside it, or a stretch of
operations that a composite layer (a block, the model itself) does between its parts.
Atoms that use the same variable, that are colocated, or that are joined by a tensor
that cannot cross ranks, are one atom: so tied weights stay together by construction.
"""

import dataclasses
from collections.abc import Iterable, Mapping, Set

from smp_tf.errors import PartitionError
from smp_tf.plan.graph import Graph, Node, node_of
from smp_tf.plan.roles import Roles, touched_variables

_SUMS = frozenset({"AddN", "AddV2", "Add"})


@dataclasses.dataclass(frozen=True)
class Atom:
    """Nodes that run on one partition.

    Attributes:
        layers: paths of the layers in it, in order of first use.
        variables: indices of the model variables it owns.
        pin: partition that it must be on (``smp.partition``), None when free.
    """

    layers: tuple[str, ...]
    variables: tuple[int, ...]
    pin: int | None = None

    @property
    def name(self) -> str:
        if not self.layers:
            return "(operations outside layers)"
        rest = len(self.layers) - 1
        return self.layers[0] + (f" (+{rest})" if rest else "")


@dataclasses.dataclass(frozen=True)
class Atoms:
    """All atoms in order of first use, and where every placed or read node belongs."""

    atoms: tuple[Atom, ...]
    atom_of: Mapping[str, int]
    atom_of_variable: Mapping[int, int]


def find_atoms(graph: Graph, roles: Roles) -> Atoms:
    """Atoms for automatic partitioning: by layer call and by shared variables."""
    groups = _layer_groups(graph, roles)
    _join_shared(graph, roles, groups)
    _join_idle(roles, groups)
    return _atoms(graph, roles, groups.roots(), {})


def pinned_atoms(
    graph: Graph, roles: Roles, num_partitions: int, default_partition: int
) -> Atoms:
    """Atoms for manual placement: one for each partition.

    Raises:
        PartitionError: a pin is out of range, or operations that use one variable are
            pinned to different partitions.
    """
    chosen: dict[str, int] = {}
    for node in graph.nodes:
        if not _is_model_forward(node, roles):
            continue
        partition = default_partition if node.pin is None else node.pin
        if not 0 <= partition < num_partitions:
            raise PartitionError(
                f"smp.partition takes 0..{num_partitions - 1}: partition={partition}"
                f" operation={node.name!r} layer={node.layer!r};"
                f" partitions={num_partitions}"
            )
        chosen[node.name] = partition
    _check_variables(graph, roles, chosen)
    order = {partition: partition for partition in range(num_partitions)}
    return _atoms(graph, roles, chosen, order)


def _is_model_forward(node: Node, roles: Roles) -> bool:
    is_read = node.name in roles.variable_of_read
    return (
        bool(node.layer)
        and node.name not in roles.backward
        and (is_read or roles.is_placed(node.name))
    )


def _check_variables(graph: Graph, roles: Roles, chosen: Mapping[str, int]) -> None:
    """Operations that use a variable directly must agree on its partition."""
    users: dict[int, dict[int, Node]] = {}
    for node in graph.nodes:
        if node.name in chosen:
            for index in used_variables(graph, roles, node):
                users.setdefault(index, {}).setdefault(chosen[node.name], node)
    for index, by_partition in users.items():
        if len(by_partition) > 1:
            where = ", ".join(
                f"partition {p}: layer {n.layer!r} operation {n.name!r}"
                for p, n in sorted(by_partition.items())
            )
            raise PartitionError(
                "operations that use the same variable must be on one partition:"
                f" variable={graph.variables[index].name!r}; {where}; put them in the"
                " same smp.partition, or set auto_partition to true"
            )


def used_variables(graph: Graph, roles: Roles, node: Node) -> list[int]:
    """Model variables that ``node`` reads, writes, or computes with directly."""
    direct = touched_variables(graph, node)
    read = [
        roles.variable_of_read[name]
        for name in map(node_of, node.inputs)
        if name in roles.variable_of_read
    ]
    return [index for index in direct + read if graph.variables[index].in_model]


class _Groups:
    """Union-find over groups of nodes; the earliest group of a union is its root."""

    def __init__(self) -> None:
        self.group_of: dict[str, int] = {}
        self._parent: list[int] = []

    def add(self) -> int:
        self._parent.append(len(self._parent))
        return len(self._parent) - 1

    def __len__(self) -> int:
        return len(self._parent)

    def root(self, group: int) -> int:
        while self._parent[group] != group:
            self._parent[group] = self._parent[self._parent[group]]
            group = self._parent[group]
        return group

    def join(self, one: int, other: int) -> None:
        low, high = sorted((self.root(one), self.root(other)))
        self._parent[high] = low

    def roots(self) -> dict[str, int]:
        return {name: self.root(group) for name, group in self.group_of.items()}


def _layer_groups(graph: Graph, roles: Roles) -> _Groups:
    """A new group begins when the layer changes, and inside a composite layer's own
    operations at each new variable (a model written without layers is cut there)."""
    nodes = [node for node in graph.nodes if _is_model_forward(node, roles)]
    paths = {node.layer for node in nodes}
    composite = {path.rpartition("/")[0] for path in paths} | {
        p for p in paths if "/" not in p
    }
    groups = _Groups()
    current, layer, known = -1, None, set[int]()
    for node in nodes:
        used = set(used_variables(graph, roles, node))
        is_new = node.layer != layer or (
            node.layer in composite and bool(known) and not used <= known
        )
        if is_new:
            current, layer, known = groups.add(), node.layer, set()
        known |= used
        groups.group_of[node.name] = current
    return groups


def _join_shared(graph: Graph, roles: Roles, groups: _Groups) -> None:
    first_user: dict[int, int] = {}
    users: list[str] = []
    for node in graph.nodes:
        group = groups.group_of.get(node.name)
        if group is None:
            continue
        for index in used_variables(graph, roles, node):
            groups.join(group, first_user.setdefault(index, group))
            users.append(node.name)
        for name in node.colocated:
            if name in groups.group_of:
                groups.join(group, groups.group_of[name])
        for tensor in node.inputs:
            source = groups.group_of.get(node_of(tensor))
            if source is not None and not graph.spec(tensor).can_cross:
                groups.join(group, source)
    _join_repeated(groups, {groups.group_of[name] for name in users})


def _join_repeated(groups: _Groups, owning: Set[int]) -> None:
    """What has no variables follows the repeated layer before it.

    A block that is used again comes back to the partition of its weights. Its sums and
    activations would else stay behind, as atoms of their own at the end of the model,
    and each use of the block would go to and fro between the two partitions.
    """
    for group in range(1, len(groups)):
        is_repeated = groups.root(group - 1) < group - 1
        if is_repeated and group not in owning and groups.root(group) == group:
            groups.join(group - 1, group)


def _join_idle(roles: Roles, groups: _Groups) -> None:
    """What only reads variables goes with its neighbour.

    The results of such a layer are not used, so that nothing else of it is left. As an
    atom of its own it could be all that a partition has, and that rank would idle.
    """
    working = {
        groups.root(group)
        for name, group in groups.group_of.items()
        if roles.is_placed(name)
    }
    for group in range(len(groups)):
        if groups.root(group) == group and group not in working and working:
            before = [other for other in working if other < group]
            groups.join(max(before) if before else min(working), group)
            working = {groups.root(other) for other in working}


def _atoms(
    graph: Graph, roles: Roles, chosen: Mapping[str, int], order: Mapping[int, int]
) -> Atoms:
    """Number the groups, then give every other node an atom.

    Args:
        chosen: model forward node -> group.
        order: group -> atom where the numbering is given (manual placement); otherwise
            atoms are numbered in order of first use.
    """
    number = dict(order)
    for node in graph.nodes:
        if node.name in chosen:
            number.setdefault(chosen[node.name], len(number))
    atom_of = {name: number[group] for name, group in chosen.items()}
    of_variable: dict[int, int] = {}
    for node in graph.nodes:
        if node.name in atom_of:
            for index in used_variables(graph, roles, node):
                of_variable.setdefault(index, atom_of[node.name])
    last = max(len(number), 1) - 1
    for (
        node
    ) in graph.nodes:  # a model variable that only the loss uses stays with the loss
        for index in touched_variables(graph, node):
            if graph.variables[index].in_model:
                of_variable.setdefault(index, last)
    _attribute_forward(graph, roles, atom_of, of_variable)
    _attribute_backward(graph, roles, atom_of, of_variable)
    for index, variable in enumerate(graph.variables):
        if variable.in_model:  # a variable that the step does not use stays somewhere
            of_variable.setdefault(index, 0)
    return Atoms(
        _describe_atoms(graph, roles, max(len(number), 1), atom_of, of_variable, order),
        atom_of,
        of_variable,
    )


def _describe_atoms(
    graph: Graph,
    roles: Roles,
    count: int,
    atom_of: Mapping[str, int],
    of_variable: Mapping[int, int],
    pinned: Mapping[int, int],
) -> tuple[Atom, ...]:
    layers: list[dict[str, None]] = [{} for _ in range(count)]
    variables: list[list[int]] = [[] for _ in range(count)]
    for node in graph.nodes:
        if node.layer and node.name in atom_of and node.name not in roles.backward:
            layers[atom_of[node.name]].setdefault(node.layer)
    for index in sorted(of_variable):
        variables[of_variable[index]].append(index)
    return tuple(
        Atom(tuple(layers[i]), tuple(variables[i]), i if pinned else None)
        for i in range(count)
    )


def _attribute_forward(
    graph: Graph, roles: Roles, atom_of: dict[str, int], of_variable: dict[int, int]
) -> None:
    """Forward operations outside the model run where their latest input is.

    So the loss runs where the model's outputs are, and an L2 term where its weight is;
    what has no input of the model (one_hot of the labels) runs where it is read.
    """

    def is_open(node: Node) -> bool:
        return (
            node.name not in atom_of
            and node.name not in roles.backward
            and node.name not in roles.free
            and node.name not in roles.everywhere
        )

    for node in graph.nodes:
        if not is_open(node):
            continue
        owners = [
            of_variable[i]
            for i in used_variables(graph, roles, node)
            if i in of_variable
        ]
        touched = [i for i in touched_variables(graph, node) if i in of_variable]
        if touched:
            atom_of[node.name] = of_variable[touched[0]]
            continue
        inputs = [atom_of[name] for name in _before(node) if name in atom_of] + owners
        if inputs:
            atom_of[node.name] = max(inputs)
    for node in reversed(graph.nodes):
        if is_open(node):
            readers = [
                atom_of[reader.name]
                for reader in graph.consumers[node.name]
                if reader.name in atom_of and reader.name not in roles.backward
            ]
            atom_of[node.name] = min(readers, default=0)


def _before(node: Node) -> Iterable[str]:
    """What a node follows: its inputs, or without any, its control inputs."""
    return [node_of(tensor) for tensor in node.inputs] or node.controls


def _attribute_backward(
    graph: Graph, roles: Roles, atom_of: dict[str, int], of_variable: Mapping[int, int]
) -> None:
    """Backward operations run where their forward operation is.

    What tracing could not attribute is mostly sums of gradients. A sum takes the
    earliest atom of its INPUTS, in topological order: taken from its consumers, every
    sum on a residual stream would end on partition 0 (34 segments instead of 4). The
    rest follows its consumers, then its inputs.
    """
    backward = [
        node
        for node in graph.nodes
        if node.name in roles.backward
        and node.name not in roles.free
        and node.name not in roles.everywhere
    ]
    for node in backward:
        touched = [i for i in touched_variables(graph, node) if i in of_variable]
        if touched:
            atom_of[node.name] = of_variable[touched[0]]
        elif node.forward in atom_of:
            atom_of[node.name] = atom_of[node.forward]
    for node in backward:
        if node.name not in atom_of and node.op in _SUMS:
            inputs = [
                atom_of[name]
                for name in map(node_of, node.inputs)
                if name in atom_of and name in roles.backward
            ]
            if inputs:
                atom_of[node.name] = min(inputs)
    for node in reversed(backward):
        if node.name not in atom_of:
            readers = [
                atom_of[r.name] for r in graph.consumers[node.name] if r.name in atom_of
            ]
            if readers:
                atom_of[node.name] = min(readers)
    # A gradient that is made from constants alone is wanted where its variable is.
    home = {
        node_of(tensor): of_variable[index]
        for tensor, index in graph.gradient_of.items()
        if index in of_variable
    }
    for node in backward:
        if node.name not in atom_of:
            inputs = [atom_of[name] for name in _before(node) if name in atom_of]
            atom_of[node.name] = min(inputs, default=home.get(node.name, 0))
