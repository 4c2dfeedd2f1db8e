"""The ranking of configurations, for people."""

from collections.abc import Callable, Sequence

from smp_tf.plan.ranking import Candidate
from smp_tf.report.columns import aligned, mib

_HEADER = (
    "",
    "partitions",
    "microbatches",
    "schedule",
    "step",
    "bubble",
    "fullest rank, MiB",
    "fits",
)


def ranking_table(candidates: Sequence[Candidate], shown: int = 20) -> str:
    """One line each, the best first; steps relative to the shortest of all.

    Without a profile only the ratios of steps mean anything.
    """
    rows = ranking_rows(candidates, mib)[:shown]
    lines = aligned([_HEADER, *rows], left=(3,))
    if len(candidates) > shown:
        lines.append(f"and {len(candidates) - shown} more")
    return "\n".join(lines)


def ranking_rows(
    candidates: Sequence[Candidate], sized: Callable[[int], str]
) -> list[list[str]]:
    """Cells: place, partitions, microbatches, schedule, step relative to the shortest,
    bubble, fullest rank, whether it fits.

    Args:
        candidates: the best first.
        sized: how bytes are written.
    """
    shortest = min(candidate.seconds for candidate in candidates) or 1.0
    return [
        [
            str(place),
            str(each.partitions),
            str(each.microbatches),
            each.pipeline,
            f"{each.seconds / shortest:.2f}",
            f"{each.bubble:.1%}",
            sized(each.worst_bytes),
            "yes" if each.fits else "no",
        ]
        for place, each in enumerate(candidates, start=1)
    ]
