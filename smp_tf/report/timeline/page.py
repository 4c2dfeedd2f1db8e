"""A recorded run as one HTML page: the picture and the figures of each rank.

One file, without scripts and without anything from the network.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from smp_tf.report.markup import sized, tag, text, timed
from smp_tf.report.page_style import style_sheet
from smp_tf.report.timeline.folder import RecordedRun
from smp_tf.report.timeline.plot import subtitle, title
from smp_tf.report.timeline.stats import RankStats

_META = (
    '<meta charset="utf-8">'
    '<meta name="viewport" content="width=device-width, initial-scale=1">'
)
# The picture has its own colours, made for white.
_SHEET = ".picture { background: #fff; } .picture svg { width: 100%; height: auto; }"

_HEADER = (
    ("rank", ""),
    ("partition", ""),
    ("step", "from the moment the rank began to the one it was done"),
    ("busy", "share of that time in segments, forward and backward"),
    ("waited", "share of that time without the tensor that came next"),
    ("other", "neither: arguments, sums of gradients, the calls themselves, the end"),
    ("sent", "tensors to other ranks"),
    ("most in flight", "bytes that were posted and had not left, at once"),
    ("waited for", "whose tensors"),
)


def timeline_page(run: RecordedRun, picture: str) -> str:
    """The page, as text; ``picture`` is an SVG file."""
    stats, planned = run.stats, run.planned
    slowest = max(stats.ranks, key=lambda rank: rank.busy_seconds)
    facts = [
        ("step", timed(stats.seconds), f"of {planned.num_microbatches} microbatches"),
        ("bubble", f"{stats.bubble:.1%}", "measured"),
        ("predicted bubble", f"{stats.predicted_bubble:.1%}", planned.pipeline),
        ("busiest rank", timed(slowest.busy_seconds), f"rank {slowest.rank}"),
        ("sent", sized(stats.bytes_sent), "by all ranks"),
        ("most in flight", sized(stats.peak_bytes_in_flight), "of one rank"),
    ]
    cells = [
        tag("div", tag("span", text(a)), tag("b", text(b)), tag("small", text(c)))
        for a, b, c in facts
    ]
    header = tag(
        "header",
        tag("h1", text(title(stats))),
        tag("p", text(subtitle(run))),
        tag("div", *cells, class_="facts"),
    )
    # Without what makes it a file of its own.
    drawing = re.sub(r"^.*?(?=<svg)", "", picture, count=1, flags=re.DOTALL)
    timeline = tag(
        "section",
        tag("h2", "Timeline"),
        tag(
            "p",
            "Above what was measured, below the predicted schedule on the same axis,"
            " stretched so that all ranks together are busy for as long as they were.",
        ),
        tag("div", drawing, class_="scroll picture"),
    )
    ranks = tag(
        "section",
        tag("h2", "Ranks"),
        tag("div", _table([_row(each) for each in stats.ranks]), class_="scroll"),
    )
    style = tag("style", style_sheet(0) + _SHEET)
    head = tag("head", _META, tag("title", text(title(stats))), style)
    footer = tag("footer", "Made by smp_tf.")
    body = tag("body", header, timeline, ranks, footer)
    return f"<!doctype html>\n{tag('html', head, body, lang='en')}\n"


def _row(each: RankStats) -> list[str]:
    whole = each.seconds or 1.0
    waited = ", ".join(
        f"rank {rank}: {timed(seconds)}"
        for rank, seconds in each.waiting_seconds.items()
    )
    return [
        str(each.rank),
        str(each.pp_rank),
        timed(each.seconds),
        f"{each.busy_share:.1%}",
        f"{each.waited_seconds / whole:.1%}",
        f"{each.other_seconds / whole:.1%}",
        sized(each.bytes_sent),
        sized(each.peak_bytes_in_flight),
        waited or "nobody",
    ]


def _table(rows: Sequence[Sequence[str]]) -> str:
    def kind(column: int) -> str:
        return "figure" if column < len(_HEADER) - 1 else ""

    head = tag(
        "tr",
        *(
            tag("th", text(name), title=hint, class_=kind(i))
            for i, (name, hint) in enumerate(_HEADER)
        ),
    )
    body = (
        tag("tr", *(tag("td", text(c), class_=kind(i)) for i, c in enumerate(row)))
        for row in rows
    )
    return tag("table", tag("thead", head), tag("tbody", *body))
