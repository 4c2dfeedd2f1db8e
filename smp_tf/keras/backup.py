"""``tf.keras.callbacks.BackupAndRestore`` for a model that is spread over ranks.

Each rank backs up what it has: its variables, its part of the optimizer's state, the
metrics and where in the training it is. At a restart the ranks take the last backup
that all of them have. Counts and the learning rate are restored when ``fit`` begins,
all else when a step has partitioned the model, for only then it exists.

So that the training goes on as if nothing had happened, ``fit`` leaves out the batches
of its data that were trained on; they are read, and nothing is done with them.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import tensorflow as tf

from smp_tf.errors import ConfigError, SmpError
from smp_tf.frontend.hooks import fitting, resuming
from smp_tf.keras.backup_files import BackupFiles, Position
from smp_tf.keras.backup_state import State, identity_of
from smp_tf.runtime import session

logger = logging.getLogger("smp_tf")

_KERAS = tf.keras.callbacks.BackupAndRestore


def is_stock(callback: Any) -> bool:
    """Whether it is Keras's BackupAndRestore.

    Raises:
        ConfigError: it is something derived from that.
    """
    if not isinstance(callback, _KERAS):
        return False
    kind = type(callback)
    if any(name.startswith("on_") for base in _derived(kind) for name in vars(base)):
        raise ConfigError(
            "fit does itself what BackupAndRestore does, and would not call the methods"
            f" of a class derived from it: callback={kind.__name__}; put them into a"
            " callback of its own, next to a BackupAndRestore"
        )
    if getattr(callback, "save_before_preemption", False):
        raise ConfigError(
            "BackupAndRestore cannot save before a preemption: save_before_preemption="
            "True; say save_freq"
        )
    return True


def _derived(kind: type) -> list[type]:
    return [base for base in kind.__mro__ if issubclass(base, _KERAS)][:-1]


def takes_one_iterator(x: Any, steps_per_epoch: int | None) -> bool:
    """Whether ``fit`` takes the batches of all epochs from one iterator over ``x``,
    rather than from a new one for each epoch."""
    if isinstance(x, tf.data.Dataset):
        return steps_per_epoch is not None and int(x.cardinality()) != steps_per_epoch
    if isinstance(x, (list, tuple)):
        first = tf.nest.flatten(x)[:1]
        return not (first and isinstance(first[0], (int, float, str, bytes)))
    return not isinstance(x, tf.keras.utils.Sequence)


class Backup(tf.keras.callbacks.Callback):
    """Stands in for a BackupAndRestore, as the last of the callbacks: what the others
    decide is in the backup. ``first`` is the part of it that comes before them.
    """

    def __init__(self, stock: Any, fit_arguments: Mapping[str, Any]) -> None:
        """
        Args:
            stock: the callback given by the user.
        """
        super().__init__()
        data, steps = fit_arguments.get("x"), fit_arguments.get("steps_per_epoch")
        self._every = stock.save_freq
        self._is_kept = not stock.delete_checkpoint
        self._data = data
        self._is_one_iterator = takes_one_iterator(data, steps)
        self._initial_epoch = fit_arguments.get("initial_epoch", 0)
        self._folder = str(stock.backup_dir)
        self._files = BackupFiles(self._folder, session.rank())
        self._epoch = self._calls = 0
        self._last: Position | None = None
        self._read_again: Callable[[], None] | None = None
        self.first = Resume(self)

    # --- back up

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self._epoch = epoch
        if self._read_again is not None:
            # In the middle of an epoch: what fit and the others do when it begins,
            # as to reset the metrics and to set the learning rate, was done then.
            self._read_again()
            self._read_again = None

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self._every == "epoch":
            return
        self._calls += 1
        if self._calls >= self._every:
            self._calls = 0
            self._save(self._epoch, batch + 1)

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        if self._every == "epoch":
            self._save(epoch + 1, 0)
        elif self._last is not None and self._last.step == self._step():
            # It was the epoch's last batch, as may not have been known.
            last = dataclasses.replace(self._last, epoch=epoch + 1, batch=0)
            self._agree(lambda: self._files.declare(last))

    def on_train_end(self, logs: Any = None) -> None:
        resuming.forget_start(self.model)
        if not self._is_kept:
            session.barrier(session.WORLD)  # all ranks have come to the end
            self._files.remove()

    def _step(self) -> int:
        return int(fitting.counter_of(self.model, "train").numpy())

    def _position(self, epoch: int, batch: int) -> Position:
        previous = None if self._last is None else self._last.step
        return Position(self._step(), epoch, batch, identity_of(self.model), previous)

    def _save(self, epoch: int, batch: int) -> None:
        position = self._position(epoch, batch)
        state = State(self.model)
        state.attach(with_metrics=True)
        self._agree(lambda: self._files.write(position, state.checkpoint))
        self._files.keep_only(position.step)
        self._last = position

    def _agree(self, write: Callable[[], None]) -> None:
        """Write, and go on when all ranks have.

        Raises:
            SmpError: on every rank, one of them could not.
        """
        error = ""
        try:
            write()
        except (OSError, tf.errors.OpError) as failure:
            error = f"{type(failure).__name__}: {failure}"
        found = session.allgather(error, session.WORLD)
        for rank, text in enumerate(found):
            if text:
                raise SmpError(
                    "a backup of the training was not written; the previous one is"
                    f" still there: rank {rank}: {text}"
                )

    # --- restore

    def resume(self) -> None:
        """In ``on_train_begin``."""
        self._last = position = self._latest()
        if position is None:
            return
        epoch, batch = position.epoch, position.batch
        steps = self.params.get("steps")
        if steps is not None and batch >= steps:
            epoch, batch = epoch + 1, 0
        if session.rank() == 0:
            logger.info("BackupAndRestore: epoch=%d batch=%d is next", epoch, batch)
        state, path = State(self.model), self._files.state(position.step)
        state.read(path)
        if batch:
            self._read_again = lambda: state.read(path)
        self.model.when_placed(lambda: state.restore(position.of, bool(batch)))
        resuming.start_at(self.model, epoch, batch)
        self.first.leave_out(position.step if self._is_one_iterator else batch)
        if not self._is_one_iterator and isinstance(self._data, tf.data.Dataset):
            for _ in range(epoch - self._initial_epoch):
                iter(self._data)  # a shuffle has another order in each iterator

    def _latest(self) -> Position | None:
        """The last that all ranks have; None to begin anew.

        Raises:
            SmpError: on every rank, some cannot find what they have written.
        """
        mine = {each.step: each for each in self._files.found()}
        every = session.allgather(mine, session.WORLD)
        common = set(mine).intersection(*every)
        if not common:
            if any(each.previous is not None for e in every for each in e.values()):
                found = [f"rank {rank}: {sorted(e)}" for rank, e in enumerate(every)]
                raise SmpError(
                    "there is no backup that all ranks have, though there was one:"
                    f" backup_dir={self._folder!r} steps found by {'; '.join(found)};"
                    " start the same number of ranks, where each finds its files, or"
                    " remove the folder to begin anew"
                )
            self._files.remove()  # a first one, that was not finished
            return None
        step = max(common)
        self._files.keep_only(step)
        # At the end of an epoch some may have declared theirs anew.
        epoch, batch = min((each[step].epoch, each[step].batch) for each in every)
        return dataclasses.replace(mine[step], epoch=epoch, batch=batch)


class Resume(tf.keras.callbacks.Callback):
    """The first of the callbacks: the others find what was restored."""

    def __init__(self, backup: Backup) -> None:
        super().__init__()
        self._backup = backup
        self._left_out = 0

    def leave_out(self, batches: int) -> None:
        """Of the data, before the first batch that is trained on."""
        self._left_out = batches

    def on_train_begin(self, logs: Any = None) -> None:
        self._backup.resume()

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if self._left_out:
            function = _after(self.model, self._left_out)
            self.model.train_function, self._left_out = function, 0


def _after(model: Any, batches: int) -> Callable[[Iterator[Any]], Any]:
    """The model's ``train_function``, which first takes so many batches away."""
    original = model.train_function

    def train_function(iterator: Iterator[Any]) -> Any:
        model.train_function = original
        for _ in range(batches):
            next(iterator)
        return original(iterator)

    return train_function
