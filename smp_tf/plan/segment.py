"""Cut a step into segments: what a rank can run without waiting for another.

Every node gets a level on a ring, one ring position per partition: the smallest level
that is not below its inputs' and that belongs to its partition.

    forward   level   0  1  2 | 3  4  5 ..      backward   level   0  1  2 | 3 ..
              rank    0  1  2 | 0  1  2                    rank    2  1  0 | 2

Nodes of one level form a segment. Whatever the assignment of nodes to partitions,
levels never decrease along an edge, so the segments cannot wait for each other in a
circle; a partition that is visited twice (a layer used twice, tied embeddings) simply
has two segments. A plain chain on n partitions gives exactly 2n. A backward level may
be split in two: see ``weight_gradients``.
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

from smp_tf.errors import PartitionError
from smp_tf.plan.atoms import Atoms
from smp_tf.plan.graph import Graph, Node, TensorSpec, node_of
from smp_tf.plan.link import Links, link_between
from smp_tf.plan.pipeline import Kind, Message, Pipeline, Stage
from smp_tf.plan.roles import Roles
from smp_tf.plan.weight_gradients import Instance, Placed, find_deferrable


@dataclasses.dataclass(frozen=True)
class Segment:
    """One function of one rank.

    Attributes:
        kind: F, B, or the two parts of a B: I and W.
        partition: pp_rank that runs it.
        nodes: to import, in topological order, copies of free nodes and of reads
        included.
        arguments: microbatch argument tensors it reads.
        captures: placeholder nodes it reads.
        inputs: tensors from other segments.
        outputs: tensors that other segments read or the step returns.
        needs: stages that make ``inputs``, or write a variable before it.
        after: stages of the same rank whose previous microbatch must be done before
            (see ``state_order``).
        late: nodes of a whole backward that nobody waits for; they run last, when what
            others wait for has left.
        late_seconds: estimated time of these.
    """

    stage: int
    kind: Kind
    partition: int
    nodes: tuple[str, ...]
    arguments: tuple[str, ...]
    captures: tuple[str, ...]
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    needs: tuple[int, ...]
    seconds: float
    after: tuple[int, ...] = ()
    late: tuple[str, ...] = ()
    late_seconds: float = 0.0


@dataclasses.dataclass(frozen=True)
class Cut:
    """A tensor that crosses to another pp_rank, once per microbatch.

    Attributes:
        stage: the segment that makes it.
        source, peer: pp_ranks.
        spec: dtype and [microbatch, ...] shape.
    """

    tensor: str
    stage: int
    source: int
    peer: int
    spec: TensorSpec


@dataclasses.dataclass(frozen=True)
class SegmentPlan:
    """A step cut for ``num_partitions`` ranks.

    Attributes:
        segments: in pipeline order; a segment's place is its stage.
        cuts: ordered by stage, tensor, peer; the same on every rank.
        return_stage: returned tensor -> pp_rank that needs it -> stage that makes it.
        links: how long messages take, where it was measured.
    """

    num_partitions: int
    segments: tuple[Segment, ...]
    cuts: tuple[Cut, ...]
    return_stage: Mapping[str, Mapping[int, int]]
    links: Links = dataclasses.field(default_factory=dict)

    def pipeline(self) -> Pipeline:
        """What a schedule needs to know of it."""
        sizes: dict[tuple[int, int], int] = {}
        for cut in self.cuts:
            key = cut.stage, cut.peer
            sizes[key] = sizes.get(key, 0) + cut.spec.num_bytes
        return Pipeline(
            stages=tuple(
                Stage(s.kind, s.partition, s.needs, s.seconds, s.after)
                for s in self.segments
            ),
            num_ranks=self.num_partitions,
            messages=tuple(
                Message(stage, peer, self._seconds_to_arrival(stage, peer, size))
                for (stage, peer), size in sorted(sizes.items())
            ),
        )

    def _seconds_to_arrival(self, stage: int, peer: int, size: int) -> float:
        segment = self.segments[stage]
        link = link_between(self.links, segment.partition, peer)
        return max(link.seconds(size) - segment.late_seconds, -segment.seconds)


def split_segments(
    graph: Graph,
    roles: Roles,
    atoms: Atoms,
    partition_of_atom: Sequence[int],
    num_partitions: int,
    seconds: Mapping[str, float],
    split_backward: bool = False,
    links: Links | None = None,
) -> SegmentPlan:
    """Cut a step.

    Args:
        partition_of_atom: one entry per atom.
        seconds: estimated time of a node, for scheduling.
        split_backward: a backward level becomes a segment I, for which other ranks
            wait, and a segment W with the rest, where it has both.
        links: between the ranks, where they were measured.

    Raises:
        PartitionError: a tensor that cannot be sent would have to cross ranks.
    """
    splitter = _Splitter(graph, roles, atoms, partition_of_atom, num_partitions)
    splitter.place_instances()
    splitter.defer_weight_gradients()
    plan = splitter.plan(seconds, split_backward)
    return dataclasses.replace(plan, links=links or {})


class _Splitter:
    """The working state of ``split_segments``."""

    def __init__(
        self,
        graph: Graph,
        roles: Roles,
        atoms: Atoms,
        partition_of_atom: Sequence[int],
        num_partitions: int,
    ) -> None:
        self.graph, self.roles, self.n = graph, roles, num_partitions
        self.home = {
            name: partition_of_atom[atom] for name, atom in atoms.atom_of.items()
        }
        self.owner = {
            index: partition_of_atom[atom]
            for index, atom in atoms.atom_of_variable.items()
        }
        self.level: dict[Instance, int] = {}
        self.backward_base = 0
        self.deferred: frozenset[Instance] = frozenset()

    # --- where each node runs

    @functools.cached_property
    def wanted(self) -> Mapping[str, tuple[int, ...]]:
        """Returned tensor -> pp_ranks that get it: a gradient its owner, else all."""
        every = tuple(range(self.n))
        owners = {
            tensor: (self.owner[index],)
            for tensor, index in self.graph.gradient_of.items()
            if index in self.owner
        }
        return {tensor: owners.get(tensor, every) for tensor in self.graph.returns}

    @functools.cached_property
    def remote_reads(self) -> frozenset[str]:
        """Reads whose value another partition needs: they run once on their owner."""
        found = set()
        for node in self.graph.nodes:
            for tensor in node.inputs:
                name = node_of(tensor)
                if name not in self.roles.variable_of_read:
                    continue
                if any(p != self.home[name] for p in self.partitions_of(node)):
                    found.add(name)
        return frozenset(found)

    def partitions_of(self, node: Node) -> Iterable[int]:
        if node.name in self.roles.everywhere:
            return range(self.n)
        if node.name in self.home:
            return (self.home[node.name],)
        return ()

    def is_copied(self, name: str, partition: int) -> bool:
        """True if each segment of ``partition`` makes its own copy of node ``name``."""
        if name in self.roles.free:
            return True
        return name in self.roles.variable_of_read and self.home[name] == partition

    def source(self, name: str, partition: int) -> Instance:
        """Where ``partition`` gets the outputs of node ``name`` from."""
        here = (name, partition)
        return here if here in self.level else (name, self.home[name])

    def place_instances(self) -> None:
        """Give every instance its level, forward nodes first."""
        for is_backward in (False, True):
            if is_backward:
                top = max(self.level.values(), default=-1)
                self.backward_base = (top // self.n + 1) * self.n
            for node in self.graph.nodes:
                name = node.name
                if (
                    name in self.roles.free
                    or (name in self.roles.backward) != is_backward
                ):
                    continue
                if (
                    name in self.roles.variable_of_read
                    and name not in self.remote_reads
                ):
                    continue
                for partition in self.partitions_of(node):
                    self.level[name, partition] = self._level(
                        node, partition, is_backward
                    )

    def _level(self, node: Node, partition: int, is_backward: bool) -> int:
        base = self.backward_base if is_backward else 0
        lowest = base
        for tensor in node.inputs:
            name = node_of(tensor)
            if not self.is_copied(name, partition):
                lowest = max(lowest, self.level[self.source(name, partition)])
        for control in node.controls:
            lowest = max(lowest, self.level.get((control, partition), base))
        position = self.n - 1 - partition if is_backward else partition
        return lowest + (position - (lowest - base)) % self.n

    def defer_weight_gradients(self) -> None:
        """Take out of each backward level what nobody waits for."""

        def source(name: str, partition: int) -> Instance | None:
            is_copied = self.is_copied(name, partition)
            return None if is_copied else self.source(name, partition)

        self.deferred = find_deferrable(
            Placed(
                self.graph,
                self.level,
                self.backward_base,
                self.partitions_of,
                source,
                self.wanted,
            )
        )

    # --- segments and cuts

    def plan(self, seconds: Mapping[str, float], split_backward: bool) -> SegmentPlan:
        part_of = {
            instance: (level, split_backward and instance in self.deferred)
            for instance, level in self.level.items()
        }
        levels = sorted(set(part_of.values()))
        stage_of_part = {part: stage for stage, part in enumerate(levels)}
        stage = {instance: stage_of_part[part] for instance, part in part_of.items()}
        members: list[list[Node]] = [[] for _ in levels]
        partition_of_stage = [0] * len(levels)
        for node in self.graph.nodes:
            for partition in self.partitions_of(node):
                if (node.name, partition) in stage:
                    index = stage[node.name, partition]
                    members[index].append(node)
                    partition_of_stage[index] = partition
        # tensor -> stage that makes it
        inputs: list[dict[str, int]] = [{} for _ in levels]
        outputs: list[dict[str, None]] = [{} for _ in levels]
        cuts: dict[tuple[int, str, int], Cut] = {}

        def use(tensor: str, partition: int, reader: str) -> int:
            """Let ``partition`` have ``tensor``: export it, and cut it if remote."""
            made_by = self.source(node_of(tensor), partition)
            index = stage[made_by]
            outputs[index].setdefault(tensor)
            if made_by[1] != partition:
                spec = self.graph.spec(tensor)
                if not spec.can_cross:
                    raise PartitionError(
                        "a tensor that cannot be sent must stay on one partition:"
                        f" tensor={tensor!r} spec={spec} from partition {made_by[1]} to"
                        f" {partition}, read by {reader}; put both operations on one"
                        " partition"
                    )
                cuts[index, tensor, partition] = Cut(
                    tensor, index, made_by[1], partition, spec
                )
            return index

        for index, nodes in enumerate(members):
            partition = partition_of_stage[index]
            for node in nodes:
                for tensor in node.inputs:
                    name = node_of(tensor)
                    if self.is_copied(name, partition):
                        continue
                    if stage[self.source(name, partition)] != index:
                        inputs[index][tensor] = use(tensor, partition, repr(node.name))
        returns = {
            tensor: {p: use(tensor, p, "the returned values") for p in ranks}
            for tensor, ranks in self.wanted.items()
        }
        segments = tuple(
            self._segment(
                index,
                partition_of_stage[index],
                nodes,
                inputs[index],
                outputs[index],
                self._kind(*levels[index], split_backward),
                seconds,
            )
            for index, nodes in enumerate(members)
        )

        def order(key: tuple[int, str, int]) -> tuple[int, tuple[int, int], int]:
            return key[0], self.graph.order_of(key[1]), key[2]

        return SegmentPlan(
            self.n,
            segments,
            tuple(cuts[key] for key in sorted(cuts, key=order)),
            returns,
        )

    @functools.cached_property
    def split_levels(self) -> frozenset[int]:
        return frozenset(self.level[instance] for instance in self.deferred)

    def _kind(self, level: int, is_deferred: bool, split_backward: bool) -> Kind:
        if level < self.backward_base:
            return Kind.F
        if not split_backward or level not in self.split_levels:
            return Kind.B
        return Kind.W if is_deferred else Kind.I

    def _segment(
        self,
        stage: int,
        partition: int,
        nodes: Sequence[Node],
        inputs: Mapping[str, int],
        outputs: Mapping[str, None],
        kind: Kind,
        seconds: Mapping[str, float],
    ) -> Segment:
        arguments = {node_of(tensor): tensor for tensor in self.graph.arguments}
        captures = set(self.graph.captures)
        own = {node.name for node in nodes}
        copied: set[str] = set()
        stack = [name for node in nodes for name in map(node_of, node.inputs)]
        while stack:
            name = stack.pop()
            if name in own or name in copied or not self.is_copied(name, partition):
                continue
            copied.add(name)
            stack += map(node_of, self.graph.by_name[name].inputs)
        imported = (own | copied) - set(arguments) - captures
        late: tuple[str, ...] = ()
        if kind is Kind.B:
            late = tuple(
                n.name for n in nodes if (n.name, partition) in self.deferred
            )
        return Segment(
            stage=stage,
            kind=kind,
            partition=partition,
            nodes=tuple(n.name for n in self.graph.nodes if n.name in imported),
            arguments=tuple(t for name, t in arguments.items() if name in copied),
            captures=tuple(name for name in self.graph.captures if name in copied),
            inputs=tuple(inputs),
            outputs=tuple(outputs),
            needs=tuple(sorted(set(inputs.values()))),
            seconds=sum(seconds.get(node.name, 0.0) for node in nodes),
            late=late,
            late_seconds=sum(seconds.get(name, 0.0) for name in late),
        )
