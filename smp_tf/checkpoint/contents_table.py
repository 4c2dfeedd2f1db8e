"""What is in a checkpoint, for people."""

import math
from collections.abc import Sequence

import tensorflow as tf

from smp_tf.checkpoint.manifest import Entry
from smp_tf.checkpoint.saved import Saved
from smp_tf.report.columns import aligned

_HEADER = ("partition", "variable", "shape", "dtype", "bytes")


def contents_table(save: Saved) -> str:
    """One line for each variable, by partition, and the sums."""
    entries = save.manifest.entries.values()
    lines = aligned(
        [
            _HEADER,
            *map(_row, sorted(entries, key=lambda each: (each.mp_rank, each.name))),
            *_sums(list(entries)),
        ],
        left=(1, 2, 3),
    )
    return "\n".join(lines)


def contents_head(save: Saved, every: Sequence[Saved]) -> str:
    """The checkpoint, the job that made it, and which other ones there are."""
    manifest, layout = save.manifest, save.manifest.layout
    step = "" if manifest.step is None else f" step={manifest.step}"
    sharded = ", slots of optimizers divided" if layout.sharded else ""
    names = ", ".join(each.name for each in every)
    size = sum(file.size for file in manifest.files.values())
    return (
        f"{save.name}{step}: {layout.mp_size * layout.dp_size} ranks,"
        f" {layout.pp_size} partition(s) x {layout.dp_size} replica(s){sharded};"
        f" {len(manifest.files)} files, {size:,} bytes\n"
        f"there are: {names}"
    )


def _row(entry: Entry) -> tuple[str, ...]:
    shape = " x ".join(map(str, entry.shape)) or "-"
    return (str(entry.mp_rank), entry.name, shape, entry.dtype, _bytes([entry]))


def _sums(entries: Sequence[Entry]) -> list[tuple[str, ...]]:
    parts = sorted({entry.mp_rank for entry in entries})
    rows: list[tuple[str, ...]] = []
    for part in parts:
        own = [entry for entry in entries if entry.mp_rank == part]
        rows.append((str(part), f"{len(own)} variables", "", "", _bytes(own)))
    rows.append(("all", f"{len(entries)} variables", "", "", _bytes(entries)))
    return rows


def _bytes(entries: Sequence[Entry]) -> str:
    """Texts count as nothing: their length is not known."""
    sizes = (tf.as_dtype(each.dtype).size * math.prod(each.shape) for each in entries)
    return f"{sum(sizes):,}"
