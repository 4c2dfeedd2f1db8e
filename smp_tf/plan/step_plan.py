"""Everything decided about a step, as one value."""

import dataclasses
import os
from collections.abc import Mapping

from smp_tf.plan.action import Schedule
from smp_tf.plan.atoms import Atoms
from smp_tf.plan.check import Report
from smp_tf.plan.cost import Cost
from smp_tf.plan.graph import Graph
from smp_tf.plan.partition_file import describe_partition, save_partition
from smp_tf.plan.problem import Problem
from smp_tf.plan.profile import Profile
from smp_tf.plan.roles import Roles
from smp_tf.plan.schedule_file import describe_schedule
from smp_tf.plan.segment import SegmentPlan
from smp_tf.plan.text_file import replace_text


@dataclasses.dataclass(frozen=True)
class StepPlan:
    """Everything decided about a step, the same on every rank of an mp_group.

    Attributes:
        name: of the step.
        costs: one per atom, of one microbatch.
        problem: what the partitioner had to solve.
        piece_of_atom: which of the problem's parts, one per atom; several of them are
            on one rank where it has virtual stages.
        partition_of_atom: the pp_rank of that piece.
        schedule: of all pp_ranks, with messages.
        report: what the checker's dry run of it gave.
        advice: texts for the user about what is slower or larger than it need be.
        profile: the measured times that its seconds come from, None for estimates.
    """

    name: str
    graph: Graph
    roles: Roles
    atoms: Atoms
    costs: tuple[Cost, ...]
    problem: Problem
    piece_of_atom: tuple[int, ...]
    partition_of_atom: tuple[int, ...]
    segments: SegmentPlan
    schedule: Schedule
    report: Report
    pipeline: str
    num_microbatches: int
    advice: tuple[str, ...] = ()
    profile: Profile | None = None

    @property
    def num_partitions(self) -> int:
        return self.segments.num_partitions

    @property
    def rank_of_piece(self) -> Mapping[int, int]:
        """Piece -> pp_rank, for the pieces that have atoms."""
        return dict(zip(self.piece_of_atom, self.partition_of_atom, strict=True))

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

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the partition to a file, for the configuration key ``partition_file``.

        It is JSON, one line for each atom; change a number to move a layer.
        """
        saved = describe_partition(
            self.graph, self.atoms, self.partition_of_atom, self.num_partitions
        )
        save_partition(path, saved)

    def save_schedule(self, path: str | os.PathLike[str]) -> None:
        """Write the schedule to a file, for the configuration key ``schedule_file``.

        It is text, one line for each rank; see ``schedule_file``.
        """
        saved = describe_schedule(
            self.schedule,
            self.segments.pipeline(),
            self.name,
            self.pipeline,
            self.num_microbatches,
        )
        replace_text(path, saved.to_text())
