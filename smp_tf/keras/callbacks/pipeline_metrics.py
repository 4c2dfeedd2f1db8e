"""``smp.callbacks.PipelineMetricsCallback``."""

import logging
from typing import Any

from smp_tf.errors import SmpError
from smp_tf.keras.callbacks.figures import Figures
from smp_tf.runtime import session
from smp_tf.runtime.stats import last_step_stats

logger = logging.getLogger("smp_tf")


class PipelineMetricsCallback(Figures):
    """Show the pipeline's step time and bubble next to the metrics.

        model.fit(data, callbacks=[smp.callbacks.PipelineMetricsCallback()])

        12/12 - loss: 0.41 - step_seconds: 0.031 - bubble: 0.22

    ``step_seconds`` is the time of the step on the rank that took longest, without the
    optimizer, the data and other callbacks; ``bubble`` the share of it in which ranks
    did not compute, from 0 to 1. Both are in the logs of each batch, and as means over
    the batches in those of each epoch; see ``smp.last_step_stats`` for all figures.
    Where a batch runs as two pipelines they are those of the second.

    Every rank needs the callback: the ranks exchange their times after each batch.
    Where steps cannot be recorded, one line of the log says so, and nothing is added.
    """

    def __init__(self) -> None:
        super().__init__()
        self._is_off = False
        self._forget()

    def _forget(self) -> None:
        self._batches = 0
        self._seconds = self._bubble = 0.0

    def on_train_begin(self, logs: Any = None) -> None:
        self._is_off = False

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._forget()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._is_off:
            return
        try:
            stats = last_step_stats()
        except SmpError as error:  # on all ranks alike
            self._is_off = True
            if session.rank() == 0:
                logger.warning("PipelineMetricsCallback: no figures: %s", error)
            return
        self._batches += 1
        self._seconds += stats.seconds
        self._bubble += stats.bubble
        if logs is not None:
            logs.update(step_seconds=stats.seconds, bubble=stats.bubble)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if logs is not None and self._batches:
            logs["step_seconds"] = self._seconds / self._batches
            logs["bubble"] = self._bubble / self._batches
