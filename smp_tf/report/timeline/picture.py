"""A schedule on the simulated clock: one row a rank, each action a box to scale."""

import math

from smp_tf.plan.action import Action, Kind
from smp_tf.plan.dry_run import dry_run
from smp_tf.plan.step_plan import StepPlan
from smp_tf.report.markup import number, tag, timed

_ROW, _GAP, _LEFT, _AXIS = 34, 8, 62, 26
_LEAST_WIDTH, _MOST_WIDTH = 1060.0, 9000.0
_BOX_WIDTH = 13.0  # of a median action, if the picture does not get too wide for it
_DIGIT_WIDTH = 6.6
_TICK = 110.0


def timeline_picture(plan: StepPlan) -> str:
    """The plan's own schedule; messages take what they are estimated to."""
    pipeline = plan.segments.pipeline()

    def duration(action: Action) -> float:
        return pipeline.stages[action.stage].seconds if action.kind.is_compute else 0.0

    ends = dry_run(plan.schedule, pipeline, duration)
    seconds = plan.report.seconds or 1.0
    times = sorted(stage.seconds for stage in pipeline.stages if stage.seconds)
    median = times[len(times) // 2] if times else seconds
    width = min(max(_LEAST_WIDTH, _BOX_WIDTH * seconds / median), _MOST_WIDTH)
    scale = width / seconds
    rows = []
    for rank, actions in enumerate(plan.schedule.ranks):
        top = rank * (_ROW + _GAP)
        row = [
            tag("text", f"rank {rank}", x=0, y=top + _ROW / 2 + 4, class_="rank"),
            tag(
                "rect", x=_LEFT, y=top, width=number(width), height=_ROW, class_="idle"
            ),
        ]
        row += [
            _box(action, end - duration(action), end, top, scale)
            for action, end in zip(actions, ends[rank], strict=True)
            if action.kind.is_compute
        ]
        rows.append(tag("g", *row, class_=f"p{rank}", data_rank=rank))
    bottom = len(rows) * (_ROW + _GAP)
    total = _LEFT + width + 40
    picture = tag(
        "svg",
        *rows,
        *_axis(seconds, scale, width, bottom),
        width=number(total),
        height=bottom + _AXIS,
        viewBox=f"0 0 {number(total)} {bottom + _AXIS}",
        role="img",
        aria_label=f"{plan.pipeline} schedule of {plan.num_microbatches} microbatches",
    )
    return tag("div", picture, class_="scroll timeline", tabindex=0)


def _box(action: Action, start: float, end: float, top: float, scale: float) -> str:
    kind = "forward" if action.kind is Kind.F else "backward"
    x, width = _LEFT + start * scale, (end - start) * scale
    told = (
        f"{kind} of microbatch {action.mb}, stage {action.stage}:"
        f" {timed(start)} to {timed(end)}"
    )
    parts = [
        tag("title", told),
        tag(
            "rect",
            x=number(x),
            y=top,
            width=number(max(width, 0.5)),
            height=_ROW,
            rx=number(min(3.0, width / 4)),
        ),
    ]
    label = str(action.mb)
    if width > len(label) * _DIGIT_WIDTH + 3:
        middle = number(x + width / 2)
        parts.append(tag("text", label, x=middle, y=top + _ROW / 2 + 4))
    return tag("g", *parts, class_=f"action {kind}", data_action=str(action))


def _axis(seconds: float, scale: float, width: float, bottom: float) -> list[str]:
    """Round times, and the end of the step."""
    rough = seconds * _TICK / width
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= rough)
    count = int(seconds / step - 0.5)  # none too near the end
    found = []
    for time in [*(step * i for i in range(count + 1)), seconds]:
        x = number(_LEFT + time * scale)
        found.append(tag("line", x1=x, x2=x, y1=0, y2=bottom - 2, class_="tick"))
        found.append(tag("text", timed(time), x=x, y=bottom + 14, class_="time"))
    return found
