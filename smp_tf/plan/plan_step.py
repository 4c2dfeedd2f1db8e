"""The whole way from a traced step to every rank's schedule, as one pure function."""

import dataclasses
from collections.abc import Mapping, Sequence

from smp_tf.config import Config
from smp_tf.plan.action import Schedule
from smp_tf.plan.advice import advise_on_atoms
from smp_tf.plan.atoms import Atoms, find_atoms, pinned_atoms
from smp_tf.plan.check import Report, check
from smp_tf.plan.comm import add_messages
from smp_tf.plan.cost import OPTIMIZER_SLOTS, atom_costs, node_seconds
from smp_tf.plan.graph import Graph
from smp_tf.plan.memory_limit import plan_within, require_within
from smp_tf.plan.partition import follow_placement
from smp_tf.plan.partition_file import PartitionFile, follow_file
from smp_tf.plan.problem import pose
from smp_tf.plan.profile import Profile, apply_profile
from smp_tf.plan.roles import Roles, assign_roles, require_one_home
from smp_tf.plan.schedules import build
from smp_tf.plan.segment import SegmentPlan, split_segments
from smp_tf.plan.state_order import order_state
from smp_tf.plan.step_plan import StepPlan


def plan_step(
    graph: Graph,
    config: Config,
    owner: Mapping[int, int],
    partition_of_layer: Mapping[str, int],
    optimizer_slots: float = OPTIMIZER_SLOTS,
    given: PartitionFile | None = None,
    profile: Profile | None = None,
) -> StepPlan:
    """Partition, cut and schedule a step.

    Args:
        optimizer_slots: bytes of optimizer state per byte of a trained weight.
        owner: variable index -> partition, where an earlier step has decided it.
        partition_of_layer: layer path -> partition, likewise.
        given: a saved partition to follow where no earlier step has decided.
        profile: measured times; without it seconds are estimates, of which only the
            ratios mean something.

    Raises:
        PartitionError: the model cannot be split like this, or not within
            ``memory_limit_bytes``.
        ScheduleError: the schedule does not pass the checker.
    """
    if config.partitions > 1:
        require_one_home(graph)
    roles = assign_roles(graph)
    atoms = _atoms(graph, roles, config)
    costs = atom_costs(graph, roles, atoms, optimizer_slots)
    seconds: Mapping[str, float]
    if profile is None:
        seconds = {node.name: node_seconds(graph, node) for node in graph.nodes}
    else:
        costs, seconds = apply_profile(profile, graph, roles, atoms, costs)
    problem = pose(graph, roles, atoms, costs, config)

    def planned(chosen: tuple[int, ...]) -> StepPlan:
        segments, schedule, report = _schedule(
            graph, roles, atoms, chosen, seconds, config
        )
        return StepPlan(
            graph=graph,
            roles=roles,
            atoms=atoms,
            costs=costs,
            problem=problem,
            partition_of_atom=chosen,
            segments=segments,
            schedule=schedule,
            report=report,
            pipeline=config.pipeline,
            num_microbatches=config.microbatches,
            profile=profile,
        )

    decided = _follow(graph, atoms, config, owner, partition_of_layer, given)
    if decided is not None:
        plan = planned(decided)
        require_within(config.memory_limit_bytes, plan)
        return plan
    plan = plan_within(config.memory_limit_bytes, problem, config.contiguous, planned)
    advice = advise_on_atoms(graph, roles, atoms, costs, problem)
    return dataclasses.replace(plan, advice=advice)


def _schedule(
    graph: Graph,
    roles: Roles,
    atoms: Atoms,
    partition_of_atom: Sequence[int],
    seconds: Mapping[str, float],
    config: Config,
) -> tuple[SegmentPlan, Schedule, Report]:
    """Cut a partitioned step, and decide in which order each rank runs its parts."""
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
    return segments, schedule, report


def _atoms(graph: Graph, roles: Roles, config: Config) -> Atoms:
    if config.auto_partition:
        return find_atoms(graph, roles)
    return pinned_atoms(graph, roles, config.partitions, config.default_partition)


def _follow(
    graph: Graph,
    atoms: Atoms,
    config: Config,
    owner: Mapping[int, int],
    partition_of_layer: Mapping[str, int],
    given: PartitionFile | None,
) -> tuple[int, ...] | None:
    """The partition that is decided already: by the user, or by an earlier step."""
    if not config.auto_partition:
        return tuple(range(len(atoms.atoms)))
    earlier = follow_placement(atoms, owner, partition_of_layer)
    if given is None:
        return earlier
    if earlier is None:
        return follow_file(given, graph, atoms, None)
    is_known = [
        any(index in owner for index in atom.variables)
        or any(layer in partition_of_layer for layer in atom.layers)
        for atom in atoms.atoms
    ]
    kept = [p if known else None for p, known in zip(earlier, is_known, strict=True)]
    return follow_file(given, graph, atoms, kept)
