"""The steps that this process has built, by the numbers that the recorder knows."""

import dataclasses
import functools
import itertools

from smp_tf.plan.program import Program
from smp_tf.plan.step_plan import StepPlan
from smp_tf.report.timeline.plan import PlannedStep, planned_step
from smp_tf.report.timeline.run import Label, labels_of


@dataclasses.dataclass(frozen=True)
class BuiltStep:
    """A step of the session for one signature.

    Attributes:
        number: in the order of building; the same on all ranks of an mp_group.
    """

    number: int
    name: str
    plan: StepPlan
    program: Program

    @functools.cached_property
    def labels(self) -> tuple[Label | None, ...]:
        """What each instruction of this rank's program is."""
        return labels_of(self.program, self.plan.segments.pipeline())

    @functools.cached_property
    def planned(self) -> PlannedStep:
        """What was predicted."""
        return planned_step(self.number, self.name, self.plan)


_numbers = itertools.count()  # never given twice: runs of an old session have one, too
_built: dict[int, BuiltStep] = {}


def new_number() -> int:
    """For the next step that is emitted."""
    return next(_numbers)


def add(number: int, name: str, plan: StepPlan, program: Program) -> None:
    """A step has been built, and emitted with this number."""
    _built[number] = BuiltStep(len(_built), name, plan, program)


def find(number: int) -> BuiltStep | None:
    """The step with this number; None if it belonged to another session."""
    return _built.get(number)


def built() -> list[BuiltStep]:
    """All steps of the session, in the order of building."""
    return list(_built.values())


def forget() -> None:
    """A session begins or ends."""
    _built.clear()
