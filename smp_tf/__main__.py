"""``python -m smp_tf``: what is done before and after a training.

    plan        choose a configuration before anything is launched
    timeline    a picture of when each rank computed and waited
    checkpoint  merge, inspect or verify what smp.CheckpointManager has saved
    info        what this machine has, and what is not used and why
"""

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
from smp_tf.checkpoint.command import add_checkpoint
from smp_tf.plan.forecast import Forecast
from smp_tf.plan.ranking import Candidate, ranked
from smp_tf.report.explanation import explanation
from smp_tf.report.info import info_json, info_text
from smp_tf.report.plan_page import plan_page
from smp_tf.report.ranking_table import ranking_table
from smp_tf.report.timeline.folder import Folder, read_folder
from smp_tf.report.timeline.merge import merged_text
from smp_tf.report.timeline.page import timeline_page
from smp_tf.report.timeline.plot import timeline_plot

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
    # Loads TensorFlow, which other commands need not.
    import tensorflow as tf

    from smp_tf.runtime.planning import plan_all

    model_or_step, inputs = options.build(options.batch)
    if isinstance(model_or_step, tf.keras.Model):
        model_or_step = smp.distribute(model_or_step)
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


def timeline(options: argparse.Namespace) -> int:
    """Read the traces of a folder; write one file."""
    output: Path = options.output
    try:
        if output.suffix not in _WRITERS:
            known = ", ".join(_WRITERS)
            raise smp.SmpError(f"cannot write {str(output)!r}: use one of {known}")
        folder = read_folder(options.folder)
        if folder.ignored:
            names = ", ".join(path.name for path in folder.ignored)
            print(f"timeline: of earlier jobs, left out: {names}", file=sys.stderr)
        _WRITERS[output.suffix](folder, options)
    except (smp.SmpError, OSError) as error:
        print(f"timeline: {error}", file=sys.stderr)
        return 2
    print(f"wrote {output}")
    return 0


def info(options: argparse.Namespace) -> int:
    """Tell what was found; in a job, on rank 0."""
    from smp_tf.runtime.facts import gather_job

    found = gather_job()
    if found is not None:
        print(info_json(found) if options.json else info_text(found), flush=True)
    return 0


def _write_merged(folder: Folder, options: argparse.Namespace) -> None:
    with options.output.open("w", encoding="utf-8") as file:
        file.writelines(merged_text(folder))


def _write_picture(folder: Folder, options: argparse.Namespace) -> None:
    run = folder.choose(options.name, options.step, options.replica)
    kind = options.output.suffix[1:]
    if kind == "html":
        picture = timeline_plot(run, "svg", with_title=False)
        content = timeline_page(run, picture.decode()).encode()
    else:
        content = timeline_plot(run, kind)
    options.output.write_bytes(content)
    print(run.stats)
    if len(folder.replicas) > 1 and options.replica == 0:
        print(f"replica 0 of {len(folder.replicas)}; --replica chooses another")


_WRITERS = {
    ".png": _write_picture,
    ".svg": _write_picture,
    ".html": _write_picture,
    ".json": _write_merged,
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m smp_tf",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="command")
    _add_plan(commands)
    _add_timeline(commands)
    add_checkpoint(commands)
    _add_info(commands)
    return parser.parse_args(arguments)


def _add_timeline(commands: Any) -> None:
    sub = commands.add_parser(
        "timeline",
        help="draw a recorded run over what was predicted of it",
        description="Draw a run that `trace_dir` or smp.callbacks.TimelineCallback has"
        " recorded over what was predicted of it, or merge the traces of all ranks.",
    )
    sub.add_argument("folder", type=Path, metavar="DIR", help="with the trace files")
    sub.add_argument(
        "-o",
        "--output",
        type=Path,
        required=True,
        metavar="out.png",
        help="png, svg or html: a picture; json: all ranks in one Chrome trace, for"
        " https://ui.perfetto.dev",
    )
    sub.add_argument(
        "--step",
        type=int,
        metavar="N",
        help="which run of the step, from 0; the one with the median time if not said",
    )
    sub.add_argument(
        "--name", metavar="STEP", help="which step, where several were recorded"
    )
    sub.add_argument(
        "--replica", type=int, default=0, metavar="N", help="which mp_group, from 0"
    )
    sub.set_defaults(run=timeline)


def _add_plan(commands: Any) -> None:
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
        help="function(batch) -> (smp.step function or Keras model, its inputs)",
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


def _add_info(commands: Any) -> None:
    sub = commands.add_parser(
        "info",
        help="tell what this machine has, and what is not used and why",
        description="Tell what this machine has for smp_tf, and what is not used and"
        " why. Under `horovodrun -np N`, rank 0 tells what the ranks talk by as well.",
    )
    sub.add_argument("--json", action="store_true", help="as JSON")
    sub.set_defaults(run=info)


def main() -> int:
    options = parse()
    run: Callable[[argparse.Namespace], int] = options.run
    return run(options)


if __name__ == "__main__":
    sys.exit(main())
