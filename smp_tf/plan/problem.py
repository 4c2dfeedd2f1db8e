"""What the partitioner has to solve, as plain numbers about atoms.

    memory of rank p    its static bytes + in_flight[p] x its activation bytes
    load of rank p      memory_weight x memory / all memory
                        + (1 - memory_weight) x seconds / all seconds
    cut bytes           each flow, once for each other rank that reads it

The load of the fullest rank comes first, then the bytes cut, then the number of
messages. With virtual stages a "rank" is one of the pieces that the ranks have several
of. 1F1B keeps p - i microbatches on rank i of p (Megatron-LM, arXiv 2104.04473,
section 2.2.1), so the same layers need more memory on an early rank than on a late one.
"""

import dataclasses
import functools
from collections.abc import Sequence

from smp_tf.config import Config
from smp_tf.plan.atoms import Atoms
from smp_tf.plan.cost import Cost
from smp_tf.plan.graph import Graph, node_of
from smp_tf.plan.roles import Roles


@dataclasses.dataclass(frozen=True)
class Flow:
    """A tensor that is made in one atom and read in others.

    Attributes:
        source: atom that makes it.
        readers: other atoms that read it, ascending.
        size: bytes of one microbatch.
    """

    source: int
    readers: tuple[int, ...]
    size: int


@dataclasses.dataclass(frozen=True)
class Problem:
    """Atoms to be spread over partitions.

    Attributes:
        static_bytes: of each atom: weights, their gradients and optimizer state, and
            the activations of which one microbatch is kept.
        activation_bytes: of each atom, kept for its backward, of one microbatch.
        seconds: of each atom, forward and backward of one microbatch.
        flows: forward and backward tensors between atoms.
        edges: (before, after) pairs of atoms; a contiguous partition never puts
            ``after`` on an earlier rank than ``before``. They form no cycle: an atom
            that is used again later (tied weights) is bound by its first use only.
        in_flight: microbatches whose activations each partition keeps.
        memory_weight: 0 balances seconds only, 1 bytes only.
        memory_limit: bytes that no rank may exceed, None for no limit.
        virtual_stages: pieces of each rank; in_flight has one entry for each piece.
    """

    static_bytes: tuple[int, ...]
    activation_bytes: tuple[int, ...]
    seconds: tuple[float, ...]
    flows: tuple[Flow, ...]
    edges: tuple[tuple[int, int], ...]
    in_flight: tuple[int, ...]
    memory_weight: float
    memory_limit: int | None = None
    virtual_stages: int = 1

    @property
    def num_atoms(self) -> int:
        return len(self.seconds)

    @property
    def num_partitions(self) -> int:
        return len(self.in_flight)

    @property
    def parts(self) -> str:
        """What it is to be spread over, for errors and advice."""
        if self.virtual_stages == 1:
            return f"partitions={self.num_partitions}"
        ranks = self.num_partitions // self.virtual_stages
        return f"partitions={ranks} virtual_stages={self.virtual_stages}"

    @functools.cached_property
    def all_memory(self) -> float:
        """What all ranks hold together, if they shared the activations evenly."""
        mean = sum(self.in_flight) / self.num_partitions
        return sum(self.static_bytes) + mean * sum(self.activation_bytes)

    @functools.cached_property
    def weighted_static(self) -> tuple[float, ...]:
        """Load of each atom, whichever rank it is on."""
        memory = self.memory_weight / (self.all_memory or 1.0)
        time = (1.0 - self.memory_weight) / (sum(self.seconds) or 1.0)
        return tuple(
            memory * size + time * seconds
            for size, seconds in zip(self.static_bytes, self.seconds, strict=True)
        )

    @functools.cached_property
    def weighted_activations(self) -> tuple[float, ...]:
        """Load of each atom for every microbatch in flight."""
        memory = self.memory_weight / (self.all_memory or 1.0)
        return tuple(memory * size for size in self.activation_bytes)

    @functools.cached_property
    def atom_loads(self) -> tuple[float, ...]:
        """Load of each atom on an average rank; all together weigh 1."""
        mean = sum(self.in_flight) / self.num_partitions
        return tuple(
            static + mean * kept
            for static, kept in zip(
                self.weighted_static, self.weighted_activations, strict=True
            )
        )

    def memory(self, chosen: Sequence[int]) -> tuple[int, ...]:
        """Bytes of each rank, for the partition of each atom."""
        found = [0] * self.num_partitions
        for atom, p in enumerate(chosen):
            found[p] += self.static_bytes[atom]
            found[p] += self.in_flight[p] * self.activation_bytes[atom]
        return tuple(found)

    def loads(self, chosen: Sequence[int]) -> tuple[float, ...]:
        """Load of each rank; an even one is about 1 / num_partitions."""
        found = [0.0] * self.num_partitions
        for atom, p in enumerate(chosen):
            found[p] += self.weighted_static[atom]
            found[p] += self.in_flight[p] * self.weighted_activations[atom]
        return tuple(found)

    def cut_bytes(self, chosen: Sequence[int]) -> int:
        """Bytes that cross ranks for one microbatch."""
        return sum(flow.size * len(_peers(flow, chosen)) for flow in self.flows)

    def num_messages(self, chosen: Sequence[int]) -> int:
        """Tensors that cross ranks for one microbatch."""
        return sum(len(_peers(flow, chosen)) for flow in self.flows)

    def is_contiguous(self, chosen: Sequence[int]) -> bool:
        """Whether no edge leads to an earlier rank."""
        return all(chosen[u] <= chosen[v] for u, v in self.edges)


def _peers(flow: Flow, chosen: Sequence[int]) -> set[int]:
    return {chosen[reader] for reader in flow.readers} - {chosen[flow.source]}


def pose(
    graph: Graph, roles: Roles, atoms: Atoms, costs: Sequence[Cost], config: Config
) -> Problem:
    """The problem of a step under a configuration."""
    return Problem(
        static_bytes=tuple(
            c.weight_bytes
            + c.gradient_bytes
            + c.optimizer_bytes
            + c.late_activation_bytes
            for c in costs
        ),
        activation_bytes=tuple(cost.activation_bytes for cost in costs),
        seconds=tuple(cost.seconds for cost in costs),
        flows=_flows(graph, roles, atoms),
        edges=_edges(graph, roles, atoms),
        in_flight=_in_flight(config),
        memory_weight=config.memory_weight,
        virtual_stages=config.virtual_stages,
    )


def _in_flight(config: Config) -> tuple[int, ...]:
    """Microbatches that each piece keeps, by the textbook; see ``Problem``."""
    pieces = config.partitions * config.virtual_stages
    if config.pipeline == "simple":
        return (config.microbatches,) * pieces
    most = min(config.microbatches, config.active_microbatches)
    if config.pipeline == "zero_bubble":
        return (most,) * pieces
    # One more for every round of all ranks that is still to come.
    return tuple(
        min(most, -(-(pieces - i) // config.virtual_stages)) for i in range(pieces)
    )


def _flows(graph: Graph, roles: Roles, atoms: Atoms) -> tuple[Flow, ...]:
    readers: dict[str, set[int]] = {}
    for node in graph.nodes:
        reader = atoms.atom_of.get(node.name)
        # A free node is copied to where it is read.
        if reader is None or node.name in roles.free:
            continue
        for tensor in node.inputs:
            source = node_of(tensor)
            is_made_once = roles.is_placed(source) or source in roles.variable_of_read
            if is_made_once and atoms.atom_of.get(source, reader) != reader:
                readers.setdefault(tensor, set()).add(reader)
    return tuple(
        Flow(
            atoms.atom_of[node_of(tensor)],
            tuple(sorted(readers[tensor])),
            graph.spec(tensor).num_bytes,
        )
        for tensor in sorted(readers, key=graph.order_of)
    )


def _edges(graph: Graph, roles: Roles, atoms: Atoms) -> tuple[tuple[int, int], ...]:
    found = set()
    for node in graph.nodes:
        after = atoms.atom_of.get(node.name)
        if after is None or node.name in roles.backward:
            continue
        for tensor in node.inputs:
            before = atoms.atom_of.get(node_of(tensor))
            # Against the order of first use it is a second use: no partition avoids it.
            if before is not None and before < after:
                found.add((before, after))
    return tuple(sorted(found))
