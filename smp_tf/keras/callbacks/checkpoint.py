"""``smp.callbacks.CheckpointCallback``."""

from typing import Any

import tensorflow as tf

from smp_tf.errors import ConfigError


class CheckpointCallback(tf.keras.callbacks.Callback):
    """Save a checkpoint after so many batches, or after every epoch.

        checkpoint = tf.train.Checkpoint(model=model, optimizer=optimizer)
        manager = smp.CheckpointManager(checkpoint, "checkpoints")
        save = smp.callbacks.CheckpointCallback(manager, every=100)
        model.fit(data, callbacks=[save])

    Every rank needs the callback, and saves after the same batch.

    Args:
        manager: a ``smp.CheckpointManager``, or anything else with a method ``save``
            that is called without arguments and decides what is saved and where.
        every: batches of training from one checkpoint to the next, counted over all
            epochs; or "epoch".

    Raises:
        ConfigError: the manager has no such method, or ``every`` is neither.
    """

    def __init__(self, manager: Any, every: int | str = "epoch") -> None:
        super().__init__()
        if not callable(getattr(manager, "save", None)):
            raise ConfigError(
                "CheckpointCallback needs a manager with a method `save`:"
                f" manager={manager!r}"
            )
        is_count = isinstance(every, int) and not isinstance(every, bool) and every > 0
        if not is_count and every != "epoch":
            raise ConfigError(
                "`every` must be a number of batches, at least 1, or 'epoch':"
                f" CheckpointCallback every={every!r}"
            )
        self._manager, self._every = manager, every
        self._count = 0

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self._count += 1
        if self._every != "epoch" and self._count % int(self._every) == 0:
            self._manager.save()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._every == "epoch":
            self._manager.save()
