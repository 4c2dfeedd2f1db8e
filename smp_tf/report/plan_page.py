"""A plan as one HTML page: for a person who wants to know why a layer is where it is.

One file, without scripts and without anything from the network.
"""

from collections.abc import Sequence

from smp_tf.plan.explain import Border, borders
from smp_tf.plan.forecast import Forecast, ScheduleForecast
from smp_tf.plan.link import SAME_HOST
from smp_tf.plan.ranking import Candidate
from smp_tf.plan.segment import Cut
from smp_tf.plan.step_plan import StepPlan
from smp_tf.report.explanation import notes, pieces, sentences
from smp_tf.report.layers.picture import layer_picture
from smp_tf.report.markup import sized, tag, text, timed
from smp_tf.report.memory_bars import memory_bars
from smp_tf.report.page_style import style_sheet
from smp_tf.report.ranking_table import ranking_rows
from smp_tf.report.timeline.picture import timeline_picture

_CANDIDATES_SHOWN = 10
_META = (
    '<meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
)


def plan_page(
    forecast: Forecast,
    candidates: Sequence[Candidate] = (),
    memory_limit: int | None = None,
) -> str:
    """The page, as text.

    Args:
        candidates: the ranking that the forecast comes from, the best first.
        memory_limit: bytes that a rank may need.
    """
    plan = forecast.plan
    title = f"{_model_name(plan)} on {plan.num_partitions} partitions"
    sections = [
        _header(title, forecast, memory_limit),
        _section(
            "layers",
            "Where each layer is",
            "A box is a layer, or neighbours that belong together; the number and the"
            " bar under its name are the memory it takes. Lines are tensors of the"
            " forward pass, wider for more bytes; coloured ones cross to another"
            " partition, with their bytes for a microbatch, and dashed ones lead back"
            " to an earlier one. Rest the mouse on a box or a line for more.",
            layer_picture(plan, notes(plan)),
        ),
        _reasons(plan),
        _section(
            "memory",
            "Memory of each rank at its fullest moment",
            "",
            memory_bars(forecast.memory, memory_limit),
        ),
        _timeline(plan),
        _crossing(forecast),
        _ranking(candidates),
    ]
    style = tag("style", style_sheet(plan.num_partitions))
    head = tag("head", _META, tag("title", text(title)), style)
    footer = tag("footer", f"Made by smp_tf. {_origin(plan)}")
    body = tag("body", *sections, footer)
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _origin(plan: StepPlan) -> str:
    """Of all times."""
    if plan.profile is None:
        return (
            "Times are estimated from static shapes: only their ratios mean something."
        )
    return "Times come from a profile: the model's parts were measured."


def _model_name(plan: StepPlan) -> str:
    layers = [layer for atom in plan.atoms.atoms for layer in atom.layers]
    names = dict.fromkeys(layer.partition("/")[0] for layer in layers)
    return ", ".join(names) or "A step"


def _section(name: str, title: str, introduction: str, *content: str) -> str:
    first = tag("p", introduction) if introduction else ""
    return tag("section", tag("h2", text(title)), first, *content, id=name)


def _header(title: str, forecast: Forecast, limit: int | None) -> str:
    plan, schedule = forecast.plan, forecast.schedules[0]
    fullest = max(range(plan.num_partitions), key=lambda r: forecast.memory[r].total)
    optimizer = sum(memory.optimizer for memory in forecast.memory)
    facts = [
        _fact("schedule", plan.pipeline, f"{plan.num_microbatches} microbatches"),
        _fact("predicted step", timed(schedule.seconds), _rate(schedule)),
        _fact("bubble", f"{schedule.bubble:.1%}", "ranks' time spent waiting"),
        _fact("fullest rank", sized(schedule.worst_bytes), f"rank {fullest}"),
        _fact("crosses ranks", sized(forecast.bytes_per_step), "in a step"),
        _fact(
            "optimizer's state",
            sized(optimizer),
            "on all ranks",
        ),
    ]
    if limit is not None:
        fits = forecast.fits(limit)
        left = sized(abs(limit - schedule.worst_bytes))
        facts.append(
            _fact(
                f"limit {sized(limit)}",
                "fits" if fits else "does not fit",
                f"{left} {'left' if fits else 'too much'} on rank {fullest}",
                "" if fits else "bad",
            )
        )
    warnings = [tag("p", text(advice), class_="warning") for advice in plan.advice]
    return tag(
        "header",
        tag("h1", text(title)),
        tag("div", *facts, class_="facts"),
        *warnings,
    )


def _rate(schedule: ScheduleForecast) -> str:
    rate = schedule.examples_per_second
    return "of all microbatches" if rate is None else f"about {rate:.3g} examples/s"


def _fact(name: str, value: str, remark: str, kind: str = "") -> str:
    parts = tag("span", text(name)), tag("b", text(value)), tag("small", text(remark))
    return tag("div", *parts, class_=kind)


def _reasons(plan: StepPlan) -> str:
    found = [
        _border(plan, border)
        for border in borders(plan.problem, plan.piece_of_atom)
    ]
    if not found:
        return ""
    weight = plan.problem.memory_weight
    return _section(
        "reasons",
        "Why the borders are where they are",
        "The fullest rank is to be as light as possible, then few bytes are to cross."
        f" Load is {weight:.0%} memory and {1 - weight:.0%} compute; an even share"
        f" is 1{pieces(plan)}.",
        tag("div", *found, class_="borders"),
    )


def _border(plan: StepPlan, border: Border) -> str:
    left, right = (plan.rank_of_piece[border.left + i] for i in (0, 1))
    there, back = (
        sum(c.spec.num_bytes for c in plan.segments.cuts if (c.source, c.peer) == way)
        for way in ((left, right), (right, left))
    )
    title = (
        tag("b", f"{border.left}", class_=f"p{left}")
        + " | "
        + tag("b", f"{border.left + 1}", class_=f"p{right}")
        + tag("span", f" · {sized(there)} → and ← {sized(back)} a microbatch")
    )
    reasons = [
        tag("li", tag("b", text(what)), " ", text(why))
        for what, why in sentences(plan, border)
    ]
    return tag(
        "div",
        tag("h3", title),
        tag("ul", *reasons),
        class_="border",
        data_left=border.left,
    )


def _latency(plan: StepPlan) -> str:
    found = sorted(link.latency_seconds for link in plan.segments.links.values())
    if not found:
        return f"an estimated {timed(SAME_HOST.latency_seconds)}"
    return " to ".join(dict.fromkeys(timed(each) for each in (found[0], found[-1])))


def _timeline(plan: StepPlan) -> str:
    legend = "".join(
        tag("span", tag("i", class_=f"{kind} p0"), text(name))
        for kind, name in (
            ("forward", "forward of a microbatch (its number)"),
            ("backward", "backward"),
            ("idle", "waiting"),
        )
    )
    title = (
        f"Predicted timeline: {timed(plan.report.seconds)} a step,"
        f" {plan.report.bubble:.1%} bubble"
    )
    introduction = (
        f"Schedule {plan.pipeline}; between ranks a message takes {_latency(plan)} and"
        f" its bytes. {_origin(plan)}"
    )
    return _section(
        "timeline",
        title,
        introduction,
        tag("div", legend, class_="legend"),
        timeline_picture(plan),
    )


def _crossing(forecast: Forecast) -> str:
    if not forecast.cuts:
        return ""
    by_tensor: dict[tuple[str, int], list[Cut]] = {}
    for cut in forecast.cuts:
        by_tensor.setdefault((cut.tensor, cut.source), []).append(cut)
    rows = []
    for (tensor, source), cuts in by_tensor.items():
        size = cuts[0].spec.num_bytes * len(cuts)
        total = size * forecast.plan.num_microbatches
        peers = ", ".join(str(cut.peer) for cut in cuts)
        rows.append(
            [tensor, str(source), peers, str(cuts[0].spec), sized(size), sized(total)]
        )
    header = ["tensor", "from", "to", "type", "a microbatch", "a step"]
    table = _table(header, rows, figures=(4, 5))
    return _section(
        "crossing", "What crosses ranks", "", tag("div", table, class_="scroll")
    )


def _ranking(candidates: Sequence[Candidate]) -> str:
    if not candidates:
        return ""
    rows = ranking_rows(candidates, sized)[:_CANDIDATES_SHOWN]
    header = ["", "partitions", "microbatches", "schedule", "step", "bubble"]
    header += ["fullest rank", "fits"]
    rest = len(candidates) - len(rows)
    return _section(
        "ranking",
        "Configurations that were compared",
        "The best first; steps relative to the shortest of all."
        + (f" {rest} more are left out." if rest else ""),
        tag(
            "div",
            _table(header, rows, figures=(1, 2, 4, 5, 6), best=True),
            class_="scroll",
        ),
    )


def _table(
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    figures: Sequence[int],
    best: bool = False,
) -> str:
    """A table; ``figures`` are columns that go to the right, ``best`` is the first."""

    def row(name: str, cells: Sequence[str], kind: str = "") -> str:
        return tag(
            "tr",
            *(
                tag(name, text(cell), class_="figure" if i in figures else "path")
                for i, cell in enumerate(cells)
            ),
            class_=kind,
        )

    return tag(
        "table",
        tag("thead", row("th", header)),
        tag(
            "tbody",
            *(
                row("td", cells, "best" if best and not i else "")
                for i, cells in enumerate(rows)
            ),
        ),
    )
