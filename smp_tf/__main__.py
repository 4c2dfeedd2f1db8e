"""``python -m smp_tf plan``: choose a configuration before anything is launched."""

import argparse
import importlib
import os
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import smp_tf as smp
from smp_tf.plan.ranking import ranked
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


def plan(options: argparse.Namespace) -> int:
    """Rank all combinations; explain the best."""
    model_or_step, inputs = options.build(options.batch)
    found = plan_all(
        model_or_step,
        inputs,
        partitions=options.partitions,
        microbatches=options.microbatches,
        optimizer=options.optimizer,
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
    print(smp.partition_table(best.forecast.plan))
    print(f"\n{smp.forecast_table(best.forecast)}")
    return 0 if best.fits else 1


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
    sub.set_defaults(run=plan)
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
