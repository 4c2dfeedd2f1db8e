"""``smp.callbacks``: callbacks for ``fit``, and for training loops by hand.

==============================  ====================================================
``BroadcastVariablesCallback``  all replicas begin with the variables of one
``CheckpointCallback``          a checkpoint after so many batches or each epoch
``MemoryCallback``              peak memory of each rank, beside what was planned
``PartitionCallback``           the partition table, once there is a partition
``PipelineMetricsCallback``     step time and bubble in progress bar and history
``TimelineCallback``            record when each rank computed and waited
==============================  ====================================================

Give them to ``fit`` on every rank.
"""

from smp_tf.keras.callbacks.broadcast import BroadcastVariablesCallback
from smp_tf.keras.callbacks.checkpoint import CheckpointCallback
from smp_tf.keras.callbacks.memory import MemoryCallback
from smp_tf.keras.callbacks.partition import PartitionCallback
from smp_tf.keras.callbacks.pipeline_metrics import PipelineMetricsCallback
from smp_tf.keras.callbacks.timeline import TimelineCallback

__all__ = [
    "BroadcastVariablesCallback",
    "CheckpointCallback",
    "MemoryCallback",
    "PartitionCallback",
    "PipelineMetricsCallback",
    "TimelineCallback",
]
