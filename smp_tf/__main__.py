"""``python -m smp_tf plan``: choose a configuration before anything is launched."""

import argparse
import functools
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import smp_tf as smp
from smp_tf.plan.forecast import Forecast
from smp_tf.plan.ranking import Candidate, ranked
from smp_tf.report.explanation import explanation
from smp_tf.report.plan_page import plan_page
from smp_tf.report.ranking_table import ranking_table
from smp_tf.runtime.planning import plan_all

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


def bytes_of(text: str) -> int:
    """``16GB``, ``16GiB``, ``500M`` or plain bytes."""
    match = re.fullmatch(r"([\d.]+)\s*([KMGT]?)(i?)B?", text.strip(), re.IGNORECASE)
    if not match or (match[3] and not match[2]):
        raise argparse.ArgumentTypeError(f"not a size: {text!r}; write 16GB or 16GiB")
    units = _BINARY if match[3] else _UNITS
    return round(float(match[1]) * units[match[2].upper()])


def counts(text: str) -> list[int]:
    """``2,4,8``."""
    numbers = text.split(",")
    if not all(each.strip().isdecimal() and int(each) > 0 for each in numbers):
        raise argparse.ArgumentTypeError(f"not numbers above 0: {text!r}; write 2,4,8")
    return sorted({int(each) for each in numbers})


def builder(text: str) -> Callable[[int], Any]:
    """``package.module:function``."""
    module, _, name = text.partition(":")
    if not name:
        raise argparse.ArgumentTypeError(f"write module:function, not {text!r}")
    sys.path.insert(0, os.getcwd())  # a script beside the caller, as python -m has it
    try:
        found: Callable[[int], Any] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from error
    return found


def writable(text: str) -> Path:
    """A file to write later; refused now rather than after minutes of planning."""
    path = Path(text)
    try:
        is_new = not path.exists()
        path.open("ab").close()
        if is_new:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(
            f"cannot write {text!r}: {error.strerror}"
        ) from error
    return path


def plan(options: argparse.Namespace) -> int:
    """Rank all combinations; explain the best."""
    model_or_step, inputs = options.build(options.batch)
    forecast_all = functools.partial(
        plan_all,
        model_or_step,
        inputs,
        optimizer=options.optimizer,
        memory_limit_bytes=options.memory_limit,
        over_limit=True,
        profile=options.profile,
    )
    found = forecast_all(
        partitions=options.partitions, microbatches=options.microbatches
    )
    forecasts = [each for each in found if not isinstance(each, smp.SmpError)]
    for error in dict.fromkeys(str(e) for e in found if isinstance(e, smp.SmpError)):
        print(f"not possible: {error}", file=sys.stderr)
    if not forecasts:
        return 1
    candidates = ranked(forecasts, options.memory_limit)
    print(ranking_table(candidates))
    best = candidates[0]
    if not best.fits:
        print(
            f"\nnothing fits: memory_limit={options.memory_limit} bytes; the least that"
            f" a rank can do with is {best.worst_bytes}"
        )
    print(
        f"\nbest: partitions={best.partitions} microbatches={best.microbatches}"
        f" pipeline={best.pipeline}\n"
    )
    forecast = _with_schedule(best, forecast_all)
    reasons = explanation(forecast.plan)
    print(smp.partition_table(forecast.plan))
    if reasons:
        print(f"\n{reasons}")
    print(f"\n{smp.forecast_table(forecast)}")
    if options.html:
        page = plan_page(forecast, candidates, options.memory_limit)
        options.html.write_text(page, encoding="utf-8")
        print(f"\nwrote {options.html}")
    return 0 if best.fits else 1


def _with_schedule(
    best: Candidate, forecast_all: Callable[..., list[Forecast | smp.SmpError]]
) -> Forecast:
    """The forecast whose plan has the candidate's schedule."""
    if best.forecast.plan.pipeline == best.pipeline:
        return best.forecast
    (found,) = forecast_all(
        partitions=[best.partitions],
        microbatches=[best.microbatches],
        pipeline=best.pipeline,
    )
    # It was possible a moment ago.
    return best.forecast if isinstance(found, smp.SmpError) else found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m smp_tf", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    sub = commands.add_parser(
        "plan",
        help="rank configurations of a model and explain the best",
        description="Rank configurations of a model and explain the best. No launcher"
        " and no memory for the weights is needed.",
    )
    sub.add_argument(
        "build",
        type=builder,
        metavar="module:function",
        help="function(batch) -> (smp.step function or DistributedModel, its inputs)",
    )
    sub.add_argument("--partitions", type=counts, default=[2, 4], metavar="2,4")
    sub.add_argument("--microbatches", type=counts, default=[4, 8], metavar="4,8")
    sub.add_argument("--batch", type=int, default=32)
    sub.add_argument("--memory-limit", type=bytes_of, metavar="16GB")
    sub.add_argument("--optimizer", default="adam")
    sub.add_argument(
        "--profile",
        action="store_true",
        help="measure one microbatch here instead of estimating seconds",
    )
    sub.add_argument(
        "--html",
        type=writable,
        metavar="out.html",
        help="write the best as a page: the model by partition, memory, timeline",
    )
    sub.set_defaults(run=plan)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
