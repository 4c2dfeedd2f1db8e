"""The last of the callbacks: what the others decided holds on every rank."""

from typing import Any

import tensorflow as tf

from smp_tf.keras import meeting


class Agreement(tf.keras.callbacks.Callback):
    """Added to every ``fit``; runs after the user's callbacks.

    A callback that stops the training stops it on all ranks; all go on with the
    learning rate of the first rank of the mp_group. Logs are the same on all ranks
    already, so that the usual callbacks decide alike; this is for those that look at
    the clock, at a file or at random numbers.
    """

    def __init__(self, has_others: bool) -> None:
        """
        Args:
            has_others: without other callbacks there is nothing to agree on.
        """
        super().__init__()
        self._has_others = has_others

    def on_train_begin(self, logs: Any = None) -> None:
        steps = self.params.get("steps")
        meeting.agree(f"{'an unknown number of' if steps is None else steps} batches")

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        meeting.agree(f"epoch {epoch}")
        if self._has_others:
            self._take_learning_rate()

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._has_others:
            self._take_stop()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._has_others:
            self._take_stop()

    def on_train_end(self, logs: Any = None) -> None:
        meeting.agree("end of training")

    def _take_stop(self) -> None:
        self.model.stop_training = meeting.any_of(self.model.stop_training)

    def _take_learning_rate(self) -> None:
        rate = getattr(self.model.optimizer, "learning_rate", None)
        if isinstance(rate, tf.Variable):
            agreed = meeting.first_of(rate.numpy())
            if agreed != rate.numpy():
                rate.assign(agreed)
