"""The configurations of the scripts' tests, and how a rank goes through them."""

import dataclasses
import functools
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

import smp_tf as smp
from tests.conformance.compare import OPTIONS
from tests.conformance.table import Row, idle_partitions, stages_of
from tests.conformance.truths import Truths

# partitions -> (microbatches, schedule); batches are multiples of 8.
GRIDS: dict[int, list[tuple[int, str]]] = {
    2: [(2, "interleaved"), (4, "zero_bubble")],
    3: [(4, "simple")],
    4: [(8, "interleaved")],
}
REAL_GRIDS = {2: [(2, "interleaved")], 3: [(4, "zero_bubble")], 4: [(2, "simple")]}
LIMIT_SECONDS = 560  # of one launch; a few times what it takes


@dataclasses.dataclass(frozen=True)
class Config:
    """One configuration of a session."""

    partitions: int
    microbatches: int
    schedule: str


def cases_of(
    cases_by_theme: Mapping[str, Sequence[Any]], themes: str, only: str = ""
) -> list[Any]:
    """The cases of some themes, "one+other", that share a launch (starting TensorFlow
    on 4 ranks takes as long as many scripts); ``only`` is for people: part of a name.
    """
    every = [case for theme in themes.split("+") for case in cases_by_theme[theme]]
    return [case for case in every if only in case.name]


def write_truths(
    cases: Sequence[Any],
    grids: Iterable[Sequence[tuple[int, str]]],
    truth: Callable[[Any, int], Any],
    truths: Truths,
) -> None:
    """Write ``truth(case, microbatches)`` of all that ``check_cases`` will ask for."""
    tf.config.optimizer.set_experimental_options(OPTIONS)
    counts = sorted({microbatches for grid in grids for microbatches, _ in grid})
    keys = [(case, count) for case in cases for count in counts]
    wanted = {(case.name, n): functools.partial(truth, case, n) for case, n in keys}
    assert len(wanted) == len(keys), "two cases have the same name"
    truths.write(wanted)


def check_cases(
    cases: Sequence[Any],
    size: int,
    grid: Sequence[tuple[int, str]],
    check: Callable[[Any, Config, Any], tuple[Any, list[str]]],
    truths: Truths,
) -> list[Row]:
    """Compare each case in each configuration; a row for each.

    Args:
        check: (case, configuration, truth) -> (plan of a step, what differs), inside of
            a session. What it raises is in the row too, for the others to be seen.
    """
    tf.config.optimizer.set_experimental_options(OPTIONS)
    rows = []
    for case in cases:
        for microbatches, schedule in grid:
            config = Config(size, microbatches, schedule)
            truth = truths.read(case.name, microbatches)
            stages, wrong = _checked(case, config, check, truth)
            row = Row(
                case.name, size, microbatches, schedule, case.style, stages, wrong
            )
            rows.append(row.shown())
    return rows


def _checked(
    case: Any,
    config: Config,
    check: Callable[[Any, Config, Any], tuple[Any, list[str]]],
    truth: Any,
) -> tuple[str, str]:
    """(stages, what is wrong) of one case in its own session."""
    smp.init(
        {
            "partitions": config.partitions,
            "microbatches": config.microbatches,
            "pipeline": config.schedule,
            "timeout_s": 60,
        }
    )
    try:
        plan, wrong = check(case, config, truth)
        idle = idle_partitions(plan, config.partitions)
        return stages_of(plan), "; ".join([*wrong, *filter(None, [idle])])
    except Exception as error:
        trace = "".join(traceback.format_exception(error)[-12:])
        return "", f"{type(error).__name__}: {error}"[:600] + f"\n{trace}"
    finally:
        smp.shutdown()
