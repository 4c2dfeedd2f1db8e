"""``smp.callbacks.MemoryCallback``."""

import dataclasses
import resource
import sys
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from smp_tf.keras.callbacks.figures import Figures
from smp_tf.plan.memory import memory_by_rank
from smp_tf.report.columns import aligned, mib
from smp_tf.runtime import session, timeline_steps

_MIB = 2**20
_GROWTH = 1.01  # less is not worth another table


@dataclasses.dataclass(frozen=True)
class MemoryUse:
    """What a rank has taken so far, and what was planned.

    Attributes:
        rank: in the job.
        peak_bytes: of the GPU's allocator; without a GPU, the most resident memory that
            the process has had, with TensorFlow itself.
        before_bytes: the same when ``fit`` began.
        planned_bytes: all tensors of the rank at its fullest moment, in the step that
            takes most; None without a step.
    """

    rank: int
    peak_bytes: int
    before_bytes: int
    planned_bytes: int | None


class MemoryCallback(Figures):
    """Tell after each epoch how much memory each rank has taken at most.

    Adds ``peak_mib`` to the epoch's logs, that of the rank with most, and prints a
    table on rank 0, after the first epoch and when a rank's peak has grown:

        rank  planned MiB  peak MiB  before fit
        0           212.0     790.1       561.3
        1           187.5     771.9       560.8

    Planned are the tensors (``smp.partition_table``), so that without a GPU the peak
    less what there was before is the figure next to it. Every rank needs the callback.

    Attributes:
        uses: of all ranks, after the last epoch; the same on all of them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.uses: tuple[MemoryUse, ...] = ()
        self._before = 0
        self._shown: tuple[MemoryUse, ...] = ()

    def on_train_begin(self, logs: Any = None) -> None:
        self._before = _peak_bytes()
        self._shown = ()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        mine = MemoryUse(session.rank(), _peak_bytes(), self._before, _planned_bytes())
        self.uses = tuple(session.allgather(mine, session.WORLD))
        if logs is not None:
            logs["peak_mib"] = max(use.peak_bytes for use in self.uses) / _MIB
        if session.rank() == 0 and self._has_grown():
            print(f"\n{memory_table(self.uses)}", flush=True)
            self._shown = self.uses

    def _has_grown(self) -> bool:
        return not self._shown or any(
            now.peak_bytes > _GROWTH * then.peak_bytes
            for now, then in zip(self.uses, self._shown, strict=True)
        )


def memory_table(uses: Sequence[MemoryUse]) -> str:
    """One line for each rank."""
    rows = [("rank", "planned MiB", "peak MiB", "before fit")]
    for use in uses:
        planned = "-" if use.planned_bytes is None else mib(use.planned_bytes)
        rows.append(
            (str(use.rank), planned, mib(use.peak_bytes), mib(use.before_bytes))
        )
    return "\n".join(aligned(rows))


def _peak_bytes() -> int:
    if tf.config.list_logical_devices("GPU"):
        return int(tf.config.experimental.get_memory_info("GPU:0")["peak"])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _planned_bytes() -> int | None:
    plans = [step.plan for step in timeline_steps.built()]
    found = [memory_by_rank(plan)[session.pp_rank()].total for plan in plans]
    return max(found, default=None)
