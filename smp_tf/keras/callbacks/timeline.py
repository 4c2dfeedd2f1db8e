"""``smp.callbacks.TimelineCallback``."""

import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

import tensorflow as tf

from smp_tf.errors import ConfigError
from smp_tf.runtime import session, timeline


class TimelineCallback(tf.keras.callbacks.Callback):
    """Record when each rank computed and waited during some batches.

        record = smp.callbacks.TimelineCallback("trace", steps=range(5, 8))
        model.fit(data, callbacks=[record])

    then ``python -m smp_tf timeline trace -o timeline.png``. For all of a training, set
    the configuration key ``trace_dir`` instead. Every rank needs the callback, and
    writes its own file; one that cannot be written is told once, and training goes on.

    In a loop of your own, call ``on_train_batch_begin(batch)`` and
    ``on_train_batch_end(batch)`` around each batch.

    Args:
        dir: folder for the trace files.
        steps: which training batches to record: one number or several, counted from 0
            over all epochs. The first batch is slow, as it traces the step.
    """

    def __init__(
        self,
        dir: str | os.PathLike[str],
        steps: int | Collection[int] = range(2, 5),
    ) -> None:
        super().__init__()
        wanted = [steps] if isinstance(steps, int) else list(steps)
        if not wanted or not all(isinstance(n, int) and n >= 0 for n in wanted):
            raise ConfigError(
                "`steps` must be a number of a batch, from 0, or several of them:"
                f" steps={steps!r}"
            )
        self._folder = Path(dir).expanduser()
        self._wanted = frozenset(wanted)
        self._count = 0
        self._is_recording = False

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        current = session.current("callbacks.TimelineCallback")
        if self._count in self._wanted and not self._is_recording:
            timeline.recorder_of(current).start(self._folder)
            self._is_recording = True

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        current = session.current("callbacks.TimelineCallback")
        if self._is_recording:
            timeline.recorder_of(current).stop(self._folder)
            self._is_recording = False
        self._count += 1
