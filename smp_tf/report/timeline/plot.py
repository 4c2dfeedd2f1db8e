"""A recorded run as a picture, over what was predicted of it.

Above what was measured, below the predicted schedule on the same axis; see
``rows``. matplotlib draws it, an optional dependency.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import Any

from smp_tf.errors import SmpError
from smp_tf.plan.pipeline import Kind
from smp_tf.report.markup import timed
from smp_tf.report.timeline import colors
from smp_tf.report.timeline.folder import RecordedRun
from smp_tf.report.timeline.rows import (
    Box,
    Row,
    measured_rows,
    predicted_rows,
    stretch,
)
from smp_tf.report.timeline.stats import StepStats

_WIDTH, _LEFT, _RIGHT = 14.0, 0.95, 1.05  # inches; the picture, and beside its rows
_ROWS = 3.4  # inches for the rows of one half, if they do not get too high or too low
_ROW_LEAST, _ROW_MOST = 0.17, 0.46
_TITLE, _UNTITLED, _BETWEEN, _BELOW = 0.82, 0.12, 0.66, 1.06
_ROW_SHARE = 0.84  # of a row's height; the rest is space
_FONT = 8.0  # points, of the numbers in boxes
_DIGIT = 0.075  # inches that a character of them takes
_DOTS = 160

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "hatch.linewidth": 0.7,
    "svg.hashsalt": "smp_tf",  # the same picture is the same file
    "svg.fonttype": "none",
}


def timeline_plot(
    run: RecordedRun, format: str, with_title: bool = True
) -> bytes:
    """The picture as ``png`` or ``svg``.

    Raises:
        SmpError: matplotlib is missing; says how to install it.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise SmpError(
            f"pictures of timelines need matplotlib: {error}; run"
            " `pip install 'smp_tf[plot]'`"
        ) from None
    with matplotlib.rc_context(_STYLE):
        ranks = len(run.group)
        high = ranks * min(max(_ROWS / ranks, _ROW_LEAST), _ROW_MOST)
        above_rows = _TITLE if with_title else _UNTITLED
        height = above_rows + high + _BETWEEN + high + _BELOW
        figure = Figure(figsize=(_WIDTH, height), facecolor="white")

        def axes(top: float) -> Any:
            across = _WIDTH - _LEFT - _RIGHT
            inches = _LEFT, height - top - high, across, high
            shares = [x / (_WIDTH, height)[i % 2] for i, x in enumerate(inches)]
            return figure.add_axes((shares[0], shares[1], shares[2], shares[3]))

        above, below = axes(above_rows), axes(above_rows + high + _BETWEEN)
        halves = (above, measured_rows(run)), (below, predicted_rows(run))
        end = max((row.end for _, rows in halves for row in rows), default=0.0) or 1.0
        for half, rows in halves:
            _draw(half, rows, end, run.planned.num_microbatches)
        if with_title:
            _write_title(figure, run)
        _write_axes(above, below, run)
        _legend(figure, run, height)
        file = io.BytesIO()
        metadata = {"Date": None} if format == "svg" else None
        figure.savefig(file, format=format, dpi=_DOTS, metadata=metadata)
        return file.getvalue()


def _draw(axes: Any, rows: Sequence[Row], end: float, num_microbatches: int) -> None:
    """One half of the picture."""
    for y, row in enumerate(rows):
        low = y - _ROW_SHARE / 2

        def bars(spans: Iterable[tuple[float, float]], **options: Any) -> None:
            found = [(start, stop - start) for start, stop in spans]
            axes.broken_barh(found, (low, _ROW_SHARE), **options)

        bars([(row.start, row.end)], facecolors=colors.OTHER, linewidth=0, zorder=1)
        bars(
            row.waits,
            facecolors=colors.WAITING,
            edgecolors=colors.HATCH,
            hatch="//////",
            linewidth=0,
            zorder=2,
        )
        inch = (_WIDTH - _LEFT - _RIGHT) / end
        widths = sorted((box.end - box.start) * inch for box in row.boxes)
        median = widths[len(widths) // 2] if widths else 0.0
        fills = [
            colors.color_of(box.action.mb, num_microbatches, box.action.kind)
            for box in row.boxes
        ]
        bars(
            ((box.start, box.end) for box in row.boxes),
            facecolors=fills,
            edgecolors="white",
            linewidth=0.6 if median > 0.06 else 0.25,
            zorder=3,
        )
        for box, fill in zip(row.boxes, fills, strict=True):
            _number(axes, box, (box.end - box.start) * inch, y, colors.text_on(fill))
        axes.text(
            1.006,
            y,
            row.remark,
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=8.5,
            color="#555555",
        )
    step = -(-len(rows) // 32)
    ticks = range(0, len(rows), step)
    axes.set_yticks(ticks, [rows[y].name for y in ticks], fontsize=9.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xlim(0, end)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", labelsize=8.5, colors="#444444")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color("#999999")


def _number(axes: Any, box: Box, inches: float, y: float, color: str) -> None:
    """The microbatch, with the kind's letter where there is room."""
    number = str(box.action.mb)
    full = f"{box.action.kind.value}{number}"
    label = next((t for t in (full, number) if inches > len(t) * _DIGIT + 0.03), None)
    if label is not None:
        axes.text(
            (box.start + box.end) / 2,
            y,
            label,
            ha="center",
            va="center_baseline",
            fontsize=_FONT,
            color=color,
            clip_on=True,
            zorder=4,
        )


def _write_title(figure: Any, run: RecordedRun) -> None:
    height = figure.get_figheight()
    left = _LEFT / _WIDTH
    figure.text(
        left,
        1 - 0.28 / height,
        title(run.stats),
        fontsize=14,
        weight="bold",
        va="center",
    )
    figure.text(
        left,
        1 - 0.54 / height,
        subtitle(run),
        fontsize=9.5,
        color="#444444",
        va="center",
    )


def _write_axes(above: Any, below: Any, run: RecordedRun) -> None:
    factor = stretch(run)
    how = "measured per layer" if run.planned.is_measured else "estimated"
    below.set_title(
        f"predicted from {how} times; shown × {factor:.3g}, so that the ranks are busy"
        " for as long as measured above",
        loc="left",
        fontsize=9.5,
        color="#444444",
        pad=5,
    )
    for half in (above, below):
        half.annotate(
            "ms",
            xy=(1, 0),
            xycoords="axes fraction",
            xytext=(7, -13),
            textcoords="offset points",
            fontsize=8.5,
            color="#444444",
        )


def title(stats: StepStats) -> str:
    """What everybody wants to know first."""
    return (
        f"{stats.name}: step {timed(stats.seconds)},"
        f" bubble {stats.bubble:.1%} measured, {stats.predicted_bubble:.1%} predicted"
    )


def subtitle(run: RecordedRun) -> str:
    """Which run this is."""
    planned = run.planned
    is_chosen = run.is_typical and run.count > 1
    chosen = ", the one with the median step time" if is_chosen else ""
    place = f"run {run.place}" if run.count > 1 else "the only run"
    among = f" of 0..{run.count - 1}" if run.count > 1 else ""
    parts = [
        f"measured: {place}{among}{chosen}",
        f"{planned.pipeline} schedule",
        f"{planned.num_microbatches} microbatch{_es(planned.num_microbatches)}",
        f"{len(run.group)} rank{'s' * (len(run.group) > 1)}",
    ]
    if run.clock_error_seconds:
        parts.append(f"clocks aligned to ± {timed(run.clock_error_seconds)}")
    return " · ".join(parts)


def _es(count: int) -> str:
    return "es" * (count > 1)


def _legend(figure: Any, run: RecordedRun, height: float) -> None:
    from matplotlib.patches import Patch

    count = run.planned.num_microbatches
    kinds = [
        kind
        for kind in (Kind.F, Kind.B, Kind.I, Kind.W)
        if any(c.action.kind is kind for row in run.planned.calls for c in row)
    ]
    gray = (0.36, 0.38, 0.42)
    handles: list[Any] = [
        Patch(facecolor=colors.shade(gray, kind), label=f"{kind.value} {name}")
        for kind, name in colors.NAMES.items()
        if kind in kinds
    ]
    handles += [
        Patch(
            facecolor=colors.WAITING,
            edgecolor=colors.HATCH,
            hatch="//////",
            linewidth=0,
            label="waiting",
        ),
        Patch(facecolor=colors.OTHER, label="other work"),
    ]
    style: dict[str, Any] = {
        "frameon": False,
        "fontsize": 9,
        "handlelength": 1.5,
        "columnspacing": 1.6,
        "borderpad": 0,
        "borderaxespad": 0,
        "labelcolor": "#333333",
    }
    left = _LEFT / _WIDTH
    figure.legend(
        handles=handles,
        loc="lower left",
        ncols=len(handles),
        bbox_to_anchor=(left, 0.46 / height),
        **style,
    )
    label = {"fontsize": 9, "color": "#333333", "va": "center_baseline"}
    if not colors.is_ramp(count):
        squares = [
            Patch(facecolor=colors.color_of(mb, count), label=f"microbatch {mb}")
            for mb in range(count)
        ]
        figure.legend(
            handles=squares,
            loc="lower left",
            ncols=count,
            bbox_to_anchor=(left, 0.2 / height),
            **style,
        )
        return
    figure.text(left, 0.26 / height, "microbatch 0", **label)
    at = (_LEFT + 0.95) / _WIDTH, 0.2 / height, 3.0 / _WIDTH, 0.13 / height
    bar = figure.add_axes(at)
    ramp = [[colors.color_of(mb, count) for mb in range(count)]]
    bar.imshow(ramp, aspect="auto", interpolation="nearest")
    bar.set_axis_off()
    figure.text((_LEFT + 4.03) / _WIDTH, 0.26 / height, str(count - 1), **label)
