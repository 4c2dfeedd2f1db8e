"""Which of many ways to run a model is best."""

import dataclasses
from collections.abc import Iterable, Sequence

from smp_tf.plan.forecast import Forecast


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One configuration.

    Attributes:
        seconds: of one step, estimated.
        worst_bytes: of the fullest rank.
        fits: within the limit on every rank; True without a limit.
        forecast: of its partitions and microbatches, with any schedule.
    """

    partitions: int
    microbatches: int
    pipeline: str
    seconds: float
    bubble: float
    worst_bytes: int
    fits: bool
    forecast: Forecast = dataclasses.field(repr=False)


def ranked(
    forecasts: Iterable[Forecast], limit_bytes: int | None = None
) -> Sequence[Candidate]:
    """Every schedule of every forecast, the best first: what fits before what does not,
    then the shortest step, then the least memory, then the fewest ranks."""
    found = [
        Candidate(
            partitions=forecast.plan.num_partitions,
            microbatches=forecast.plan.num_microbatches,
            pipeline=schedule.pipeline,
            seconds=schedule.seconds,
            bubble=schedule.bubble,
            worst_bytes=schedule.worst_bytes,
            fits=limit_bytes is None or schedule.worst_bytes <= limit_bytes,
            forecast=forecast,
        )
        for forecast in forecasts
        for schedule in forecast.schedules
    ]
    return sorted(
        found,
        key=lambda c: (
            not c.fits,
            # What does not fit is best where the least is missing.
            c.seconds if c.fits else c.worst_bytes,
            c.worst_bytes,
            c.partitions,
            c.microbatches,
            c.pipeline,
        ),
    )
