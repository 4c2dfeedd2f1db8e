"""A forecast for people: memory by rank, what crosses, the schedules."""

from collections.abc import Iterable

from smp_tf.plan.forecast import Forecast
from smp_tf.plan.segment import Cut
from smp_tf.report.columns import aligned, mib


def forecast_table(forecast: Forecast) -> str:
    """Three small tables, then what would make the plan better, if anything."""
    rows: list[tuple[str, ...]]
    parts = ("weights", "gradients", "optimizer", "activations", "allocator", "update")
    rows = [("rank", *parts, "total")]
    for rank, memory in enumerate(forecast.memory):
        sizes = [getattr(memory, part) for part in (*parts, "total")]
        rows.append((str(rank), *map(mib, sizes)))
    lines = ["MiB at the fullest moment of each rank", *aligned(rows), ""]
    rows = [("tensor", "from", "to", "type", "MiB per step")]
    for cuts in _by_tensor(forecast.cuts):
        first, peers = cuts[0], ",".join(str(cut.peer) for cut in cuts)
        size = first.spec.num_bytes * forecast.plan.num_microbatches
        rows.append(
            (
                first.tensor,
                str(first.source),
                peers,
                str(first.spec),
                mib(size * len(cuts)),
            )
        )
    lines += ["what crosses ranks", *aligned(rows, left=(0, 3)), ""]
    rows = [("schedule", "seconds", "examples/s", "bubble", "fullest rank, MiB")]
    for each in forecast.schedules:
        rate = _rate(each.examples_per_second)
        figures = f"{each.seconds:.4g}", rate, f"{each.bubble:.1%}"
        rows.append((each.pipeline, *figures, mib(each.worst_bytes)))
    how = "estimated" if forecast.plan.profile is None else "measured"
    lines += [f"{how} step by schedule", *aligned(rows)]
    return "\n".join([*lines, *forecast.plan.advice])


def _rate(examples: float | None) -> str:
    if examples is None:
        return "?"
    return f"{examples:,.0f}" if examples >= 100 else f"{examples:.3g}"


def _by_tensor(cuts: Iterable[Cut]) -> list[list[Cut]]:
    """Those of one tensor together: a loss goes to all ranks."""
    found: dict[tuple[str, int], list[Cut]] = {}
    for cut in cuts:
        found.setdefault((cut.tensor, cut.source), []).append(cut)
    return list(found.values())
