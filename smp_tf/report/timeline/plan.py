"""What was predicted of a step, as a recorded timeline keeps it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from smp_tf.plan.action import Action
from smp_tf.plan.dry_run import dry_run
from smp_tf.plan.step_plan import StepPlan


@dataclasses.dataclass(frozen=True)
class PredictedCall:
    """A call on the simulated clock; seconds from the start of the step."""

    action: Action
    start: float
    end: float


@dataclasses.dataclass(frozen=True)
class PlannedStep:
    """The facts of a step that its picture needs.

    Attributes:
        number: in the order of building, from 0.
        pipeline: name of the schedule.
        seconds, bubble: of the checker's dry run; see ``plan.check.Report``.
        calls: of each pp_rank, in order.
        is_measured: the seconds come from a profile, not from the cost model, of which
            only ratios mean anything.
    """

    number: int
    name: str
    pipeline: str
    num_microbatches: int
    seconds: float
    bubble: float
    calls: tuple[tuple[PredictedCall, ...], ...]
    is_measured: bool = False

    @property
    def busy_seconds(self) -> float:
        """Of all ranks together."""
        return sum(call.end - call.start for calls in self.calls for call in calls)

    def to_json(self) -> dict[str, Any]:
        """For the file; ``from_json`` reads it."""
        values = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name != "calls"
        }
        values["calls"] = [
            [[str(each.action), each.start, each.end] for each in calls]
            for calls in self.calls
        ]
        return values

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> PlannedStep:
        """What ``to_json`` made; any other mapping raises KeyError or the like."""
        calls = tuple(
            tuple(
                PredictedCall(Action.from_text(text), start, end)
                for text, start, end in row
            )
            for row in values["calls"]
        )
        return cls(**{**values, "calls": calls})


def planned_step(number: int, name: str, plan: StepPlan) -> PlannedStep:
    """Let the schedule run on the simulated clock, as the checker does."""
    pipeline = plan.segments.pipeline()

    def duration(action: Action) -> float:
        return pipeline.stages[action.stage].seconds if action.kind.is_compute else 0.0

    ends = dry_run(plan.schedule, pipeline, duration)
    calls = tuple(
        tuple(
            PredictedCall(action, end - duration(action), end)
            for action, end in zip(actions, times, strict=True)
            if action.kind.is_compute
        )
        for actions, times in zip(plan.schedule.ranks, ends, strict=True)
    )
    return PlannedStep(
        number,
        name,
        plan.pipeline,
        plan.num_microbatches,
        plan.report.seconds,
        max(plan.report.bubble, 0.0),  # rounding may leave -1e-17
        calls,
        plan.profile is not None,
    )
