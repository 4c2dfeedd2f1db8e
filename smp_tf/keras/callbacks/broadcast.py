"""``smp.callbacks.BroadcastVariablesCallback``."""

from typing import Any

import tensorflow as tf

from smp_tf.errors import ConfigError
from smp_tf.keras import replicas
from smp_tf.runtime import session


class BroadcastVariablesCallback(tf.keras.callbacks.Callback):
    """All replicas of the model begin with the variables of one of them.

    After the first batch of ``fit`` each rank of a dp_group takes over the variables
    of the group's ``root_rank``, and the state of its optimizer, which exist by then.
    With one replica it does nothing. Every rank needs the callback.

    Args:
        root_rank: dp_rank of the replica to start from.

    Raises:
        ConfigError: when training begins, there is no such replica.
    """

    def __init__(self, root_rank: int = 0) -> None:
        super().__init__()
        self._root_rank = root_rank
        self._is_done = False

    def on_train_begin(self, logs: Any = None) -> None:
        if not 0 <= self._root_rank < session.dp_size():
            raise ConfigError(
                "root_rank is the dp_rank of a replica: BroadcastVariablesCallback"
                f" root_rank={self._root_rank} dp_size={session.dp_size()}"
            )
        self._is_done = False

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._is_done:
            return
        self._is_done = True
        if session.dp_size() == 1:
            return
        replicas.take_over(self.model, self._root_rank)
