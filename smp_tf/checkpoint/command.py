"""``python -m smp_tf checkpoint``: look at checkpoints without the job.

    merge      the parts of one -> one plain checkpoint of TensorFlow
    inspect    what is in one
    verify     whether the files are what was written
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from smp_tf.errors import SmpError

_SHOWN = 10


def add_checkpoint(commands: Any) -> None:
    """Add the command to those of ``python -m smp_tf``."""
    parser = commands.add_parser(
        "checkpoint",
        help="merge, inspect or verify what smp.CheckpointManager has saved",
        description="Merge, inspect or verify what smp.CheckpointManager has saved."
        " No launcher is needed, but the mp_rank_.. folders of all partitions.",
    )
    kinds = parser.add_subparsers(required=True, metavar="what")
    merging = _add(kinds, "merge", _merge, "write all parts as one plain checkpoint")
    merging.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help="what the new files begin with: OUT.index, OUT.data-..",
    )
    _add(kinds, "inspect", _inspect, "list the variables by partition")
    _add(kinds, "verify", _verify, "compare all files with their checksums")


def _add(kinds: Any, name: str, run: Any, told: str) -> Any:
    sub = kinds.add_parser(name, help=told, description=f"{told.capitalize()}.")
    sub.add_argument(
        "directory", type=Path, metavar="DIR", help="that of smp.CheckpointManager"
    )
    sub.add_argument(
        "--prefix",
        metavar="ckpt-3",
        help="which checkpoint; "
        + ("all if not said" if name == "verify" else "the latest if not said"),
    )
    sub.set_defaults(run=_told(run))
    return sub


def _told(run: Any) -> Any:
    def command(options: argparse.Namespace) -> int:
        try:
            code: int = run(options)
        except (SmpError, OSError) as error:
            print(f"checkpoint: {error}", file=sys.stderr)
            return 2
        return code

    return command


# TensorFlow is loaded by those that run.


def _merge(options: argparse.Namespace) -> int:
    from smp_tf.checkpoint.merging import merge

    name = merge(options.directory, options.output, options.prefix)
    print(f"wrote {options.output}.index, from {name}")
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from smp_tf.checkpoint.contents_table import contents_head, contents_table
    from smp_tf.checkpoint.saved import find, saves_in

    save = find(options.directory, options.prefix)
    every = saves_in(options.directory, save.folder.name)
    print(f"{contents_head(save, every)}\n\n{contents_table(save)}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    from smp_tf.checkpoint.saved import find, lost_in, saves_in, whole_in
    from smp_tf.checkpoint.verifying import verify

    lost: dict[str, str] = {}
    if options.prefix:
        saves = [find(options.directory, options.prefix)]
    else:
        lost = lost_in(options.directory)
        saves = (whole_in if lost else saves_in)(options.directory)
    for name, text in lost.items():
        print(f"{name}: broken\n  {text}")
    is_damaged = bool(lost)
    for save in saves:
        found = verify(save)
        print(f"{save.name}: {'damaged' if found else 'whole'}")
        for damage in found:
            is_damaged = True
            print(f"  file={save.directory / damage.path}: {damage.text}")
            for name in damage.variables[:_SHOWN]:
                print(f"    variable={name} cannot be read")
            if len(damage.variables) > _SHOWN:
                print(f"    and {len(damage.variables) - _SHOWN} more variables")
    return 1 if is_damaged else 0
