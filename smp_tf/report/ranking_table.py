"""The ranking of configurations, for people."""

from collections.abc import Sequence

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
    shortest = min(candidate.seconds for candidate in candidates) or 1.0
    rows = [
        (
            str(place),
            str(each.partitions),
            str(each.microbatches),
            each.pipeline,
            f"{each.seconds / shortest:.2f}",
            f"{each.bubble:.1%}",
            mib(each.worst_bytes),
            "yes" if each.fits else "no",
        )
        for place, each in enumerate(candidates[:shown], start=1)
    ]
    lines = aligned([_HEADER, *rows], left=(3,))
    if len(candidates) > shown:
        lines.append(f"and {len(candidates) - shown} more")
    return "\n".join(lines)
