"""The whole way from a traced step to every rank's schedule, as one pure function."""

import dataclasses
import functools
from collections.abc import Mapping

from smp_tf.config import Config
from smp_tf.plan.action import Pipeline, Schedule
from smp_tf.plan.advice import advise_on_atoms
from smp_tf.plan.atoms import Atoms, find_atoms, pinned_atoms
from smp_tf.plan.check import check
from smp_tf.plan.choose import best_plan
from smp_tf.plan.comm import add_messages
from smp_tf.plan.cost import OPTIMIZER_SLOTS, Cost, atom_costs, node_seconds
from smp_tf.plan.given import Given
from smp_tf.plan.graph import Graph
from smp_tf.plan.memory_limit import plan_within, require_within
from smp_tf.plan.partition import follow_placement
from smp_tf.plan.partition_file import PartitionFile, follow_file
from smp_tf.plan.problem import Problem, pose
from smp_tf.plan.profile import Profile, apply_profile
from smp_tf.plan.rank_of_piece import rank_of_piece
from smp_tf.plan.roles import Roles, assign_roles, require_one_home
from smp_tf.plan.schedule_file import follow_schedule
from smp_tf.plan.schedules import build
from smp_tf.plan.segment import split_segments
from smp_tf.plan.state_order import order_state
from smp_tf.plan.step_plan import StepPlan


def plan_step(
    graph: Graph,
    config: Config,
    owner: Mapping[int, int],
    partition_of_layer: Mapping[str, int],
    optimizer_slots: float = OPTIMIZER_SLOTS,
    given: Given = Given(),
    profile: Profile | None = None,
    name: str = "",
) -> StepPlan:
    """Partition, cut and schedule a step.

    Args:
        optimizer_slots: bytes of optimizer state per byte of a trained weight.
        owner: variable index -> partition, where an earlier step has decided it.
        partition_of_layer: layer path -> partition, likewise.
        given: a saved partition, to follow where no earlier step has decided, and a
            saved schedule, for the step that it names.
        profile: measured times; without it seconds are estimates, of which only the
            ratios mean something.
        name: of the step.

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
    decided = _follow(graph, atoms, config, owner, partition_of_layer, given.partition)
    planner = _Planner(
        name, graph, roles, atoms, costs, seconds, profile, given, decided
    )
    return best_plan(config, planner.plan)


@dataclasses.dataclass(frozen=True, eq=False)
class _Planner:
    """A step, ready to be planned under configurations that differ in the schedule.

    Attributes:
        decided: partition of each atom where it is not to be chosen.
    """

    name: str
    graph: Graph
    roles: Roles
    atoms: Atoms
    costs: tuple[Cost, ...]
    seconds: Mapping[str, float]
    profile: Profile | None
    given: Given
    decided: tuple[int, ...] | None

    def plan(self, config: Config) -> StepPlan:
        if self.decided is not None:
            # One piece for each rank: whoever decided did not speak of pieces.
            whole = dataclasses.replace(config, virtual_stages=1)
            plan = self._planned(config, self._problem(whole), self.decided)
            require_within(config.memory_limit_bytes, plan)
            return plan
        problem = self._problem(config)
        plan = plan_within(
            config.memory_limit_bytes,
            problem,
            config.contiguous,
            functools.partial(self._planned, config, problem),
        )
        advice = advise_on_atoms(
            self.graph, self.roles, self.atoms, self.costs, problem
        )
        return dataclasses.replace(plan, advice=(*plan.advice, *advice))

    def _problem(self, config: Config) -> Problem:
        return pose(self.graph, self.roles, self.atoms, self.costs, config)

    def _planned(
        self, config: Config, problem: Problem, pieces: tuple[int, ...]
    ) -> StepPlan:
        """With each atom on this piece."""
        placement = "wave" if config.pipeline == "zero_bubble" else "loop"
        ranks = rank_of_piece(config.partitions, problem.virtual_stages, placement)
        chosen = tuple(ranks[piece] for piece in pieces)
        segments = split_segments(
            self.graph,
            self.roles,
            self.atoms,
            chosen,
            config.partitions,
            self.seconds,
            split_backward=config.pipeline == "zero_bubble",
            links=self.profile.links if self.profile else None,
        )
        segments = order_state(
            self.graph,
            segments,
            config.microbatches,
            forwards_first=config.pipeline == "simple",
        )
        pipeline = segments.pipeline()
        is_bounded = config.pipeline != "simple"
        bound = config.active_microbatches if is_bounded else None
        schedule, advice = self._schedule(config, pipeline, bound)
        return StepPlan(
            name=self.name,
            graph=self.graph,
            roles=self.roles,
            atoms=self.atoms,
            costs=self.costs,
            problem=problem,
            piece_of_atom=pieces,
            partition_of_atom=chosen,
            segments=segments,
            schedule=schedule,
            report=check(schedule, pipeline, config.microbatches, bound),
            pipeline=config.pipeline,
            num_microbatches=config.microbatches,
            advice=advice,
            profile=self.profile,
        )

    def _schedule(
        self, config: Config, pipeline: Pipeline, bound: int | None
    ) -> tuple[Schedule, tuple[str, ...]]:
        """In which order each rank runs its parts, with messages; advice about it."""
        name, count = config.pipeline, config.microbatches
        given = self.given.schedule
        advice: tuple[str, ...] = ()
        if given is not None and given.is_for(self.name, pipeline):
            schedule = follow_schedule(given, pipeline, self.name, name, count)
            # As it stands in the file, so that errors tell the place there.
            check(schedule, pipeline, count, bound)
            if schedule.has_messages:
                return schedule, ()
        else:
            schedule = build(name, pipeline, count, config.active_microbatches)
            if given is not None:
                advice = (
                    f"the schedule file is not for this step, which runs {name!r}:"
                    f" schedule_file={given.source}",
                )
        return add_messages(schedule, pipeline), advice


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
