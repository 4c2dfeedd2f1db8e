"""``smp.callbacks.PartitionCallback``."""

import logging
from typing import Any

import tensorflow as tf

from smp_tf.plan.step_plan import StepPlan
from smp_tf.report.partition_table import partition_table
from smp_tf.runtime import session, timeline_steps

logger = logging.getLogger("smp_tf")


class PartitionCallback(tf.keras.callbacks.Callback):
    """Print the partition table, on rank 0, when ``fit`` has partitioned the model.

    That is with the first batch, whose shape decides what the partitions hold. The log
    shows the same table unless it is set to warnings only: then nothing is printed a
    second time. ``plan`` is there on every rank, to look further into:

        partition = smp.callbacks.PartitionCallback()
        model.fit(data, callbacks=[partition])
        print(partition.plan.segments)

    Attributes:
        plan: of the training step; None before the first batch.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plan: StepPlan | None = None
        self._num_before = 0
        self._was_placed = False

    def on_train_begin(self, logs: Any = None) -> None:
        self.plan = None
        self._num_before = len(timeline_steps.built())
        self._was_placed = self.model.placement is not None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.plan is not None:
            return
        built = timeline_steps.built()
        if not built:  # run_eagerly: there are no partitions
            return
        self.plan = built[min(self._num_before, len(built) - 1)].plan
        is_logged = (
            not self._was_placed
            and self.plan.num_partitions > 1
            and logger.isEnabledFor(logging.INFO)
        )
        if session.rank() == 0 and not is_logged:
            print(partition_table(self.plan), flush=True)
