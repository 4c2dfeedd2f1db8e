"""The whole way from a traced step to every rank's schedule, as one pure function."""

import dataclasses
from collections.abc import Mapping

from smp_tf.config import Config
from smp_tf.plan.action import Schedule
from smp_tf.plan.advice import advise_on_atoms
from smp_tf.plan.atoms import Atoms, find_atoms, pinned_atoms
from smp_tf.plan.check import Report, check
from smp_tf.plan.comm import add_messages
from smp_tf.plan.cost import OPTIMIZER_SLOTS, Cost, atom_costs, loads, node_seconds
from smp_tf.plan.graph import Graph
from smp_tf.plan.partition import (
    cut_bytes_between,
    follow_placement,
    partition_atoms,
)
from smp_tf.plan.roles import Roles, assign_roles, require_one_home
from smp_tf.plan.schedules import build
from smp_tf.plan.segment import SegmentPlan, split_segments
from smp_tf.plan.state_order import order_state


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Everything decided about a step, the same on every rank of an mp_group.

    Attributes:
        costs: one per atom, of one microbatch.
        partition_of_atom: one per atom.
        schedule: of all pp_ranks, with messages.
        report: what the checker's dry run of it gave.
        advice: texts for the user about what is slower or larger than it need be.
    """

    graph: Graph
    roles: Roles
    atoms: Atoms
    costs: tuple[Cost, ...]
    partition_of_atom: tuple[int, ...]
    segments: SegmentPlan
    schedule: Schedule
    report: Report
    pipeline: str
    num_microbatches: int
    advice: tuple[str, ...] = ()

    @property
    def num_partitions(self) -> int:
        return self.segments.num_partitions

    @property
    def owner(self) -> Mapping[int, int]:
        """Index of a model variable -> partition."""
        return {
            index: self.partition_of_atom[atom]
            for index, atom in self.atoms.atom_of_variable.items()
        }

    @property
    def partition_of_layer(self) -> Mapping[str, int]:
        """Layer path -> partition where it is used first."""
        found: dict[str, int] = {}
        for atom, partition in zip(
            self.atoms.atoms, self.partition_of_atom, strict=True
        ):
            for layer in atom.layers:
                found.setdefault(layer, partition)
        return found


def plan_step(
    graph: Graph,
    config: Config,
    owner: Mapping[int, int],
    partition_of_layer: Mapping[str, int],
    optimizer_slots: float = OPTIMIZER_SLOTS,
) -> StepPlan:
    """Partition, cut and schedule a step.

    Args:
        optimizer_slots: bytes of optimizer state per byte of a trained weight.
        owner: variable index -> partition, where an earlier step has decided it.
        partition_of_layer: layer path -> partition, likewise.

    Raises:
        PartitionError: the model cannot be split like this.
        ScheduleError: the schedule does not pass the checker.
    """
    if config.partitions > 1:
        require_one_home(graph)
    roles = assign_roles(graph)
    atoms = _atoms(graph, roles, config)
    costs = atom_costs(graph, roles, atoms, optimizer_slots)
    weights = loads(costs, config.memory_weight)
    advice: tuple[str, ...] = ()
    partition_of_atom = _follow(atoms, config, owner, partition_of_layer)
    if partition_of_atom is None:
        advice = advise_on_atoms(graph, roles, atoms, costs, weights, config.partitions)
        partition_of_atom = partition_atoms(
            weights, cut_bytes_between(graph, roles, atoms), config.partitions
        )
    seconds = {node.name: node_seconds(graph, node) for node in graph.nodes}
    segments = split_segments(
        graph, roles, atoms, partition_of_atom, config.partitions, seconds
    )
    segments = order_state(
        graph,
        segments,
        config.microbatches,
        forwards_first=config.pipeline == "simple",
    )
    pipeline = segments.pipeline()
    compute = build(
        config.pipeline, pipeline, config.microbatches, config.active_microbatches
    )
    schedule = add_messages(compute, pipeline)
    bound = config.active_microbatches if config.pipeline == "interleaved" else None
    report = check(schedule, pipeline, config.microbatches, bound)
    return StepPlan(
        graph=graph,
        roles=roles,
        atoms=atoms,
        costs=costs,
        partition_of_atom=tuple(partition_of_atom),
        segments=segments,
        schedule=schedule,
        report=report,
        pipeline=config.pipeline,
        num_microbatches=config.microbatches,
        advice=advice,
    )


def _atoms(graph: Graph, roles: Roles, config: Config) -> Atoms:
    if config.auto_partition:
        return find_atoms(graph, roles)
    return pinned_atoms(graph, roles, config.partitions, config.default_partition)


def _follow(
    atoms: Atoms,
    config: Config,
    owner: Mapping[int, int],
    partition_of_layer: Mapping[str, int],
) -> tuple[int, ...] | None:
    """The partition that is decided already: by the user, or by an earlier step."""
    if not config.auto_partition:
        return tuple(range(len(atoms.atoms)))
    return follow_placement(atoms, owner, partition_of_layer)
