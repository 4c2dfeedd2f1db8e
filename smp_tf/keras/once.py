"""Callbacks write and print once in a job, not once on every rank.

    on every rank    EarlyStopping, LearningRateScheduler, History, your own, ..
    on rank 0, and   CSVLogger, ModelCheckpoint, RemoteMonitor, TensorBoard, and what is
    the others wait  derived from them

Those of the first row decide, from logs that are the same on all ranks, and call
methods of the model that all ranks must call. What Keras prints for them shows on
rank 0 only.
Those of the second row observe. On rank 0 they read all variables of the model, as if
it were in one process (``whole_values.on_first_rank``); what they raise, all ranks
raise; and the figures they keep, as ``ModelCheckpoint.best``, are told to all.
"""

import contextlib
import inspect
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from smp_tf.errors import ConfigError, SmpError
from smp_tf.keras.model_state import variables_of
from smp_tf.keras.whole_weights import showing_all
from smp_tf.runtime import session, whole_values

keras_callbacks = tf.keras.callbacks

OBSERVERS = (
    keras_callbacks.CSVLogger,
    keras_callbacks.ModelCheckpoint,
    keras_callbacks.RemoteMonitor,
    keras_callbacks.TensorBoard,
)
"""What is derived from them runs on rank 0 only, too."""

_BATCH_HOOKS = tuple(
    f"on_{phase}_batch_{when}"
    for phase in ("train", "test", "predict")
    for when in ("begin", "end")
)
_HOOKS = ("on_epoch_begin", "on_epoch_end") + tuple(
    f"on_{phase}_{when}"
    for phase in ("train", "test", "predict")
    for when in ("begin", "end")
)

_FIGURES = (bool, int, float, str, np.generic, type(None))


def on_first_rank(callbacks: Sequence[Any]) -> list[Any]:
    """The same callbacks, where those that observe do so on rank 0.

    Raises:
        ConfigError: a ModelCheckpoint cannot work with a DistributedModel.
    """
    for each in callbacks:
        if isinstance(each, keras_callbacks.ModelCheckpoint):
            _check(each)
    if session.size() == 1:
        return list(callbacks)
    return [
        OnFirstRank(each) if isinstance(each, OBSERVERS) else each for each in callbacks
    ]


def _check(callback: Any) -> None:
    """Now, rather than after the first epoch."""
    path = str(callback.filepath)
    if callback.load_weights_on_restart and session.size() > 1:
        raise ConfigError(
            "load_weights_on_restart looks for files on every rank, which may find"
            f" others: ModelCheckpoint filepath={path!r}; call model.load_weights"
            " before fit, or use BackupAndRestore"
        )


class OnFirstRank(tf.keras.callbacks.Callback):
    """In the place of a callback: calls it on rank 0, while the others wait.

    Batch by batch nobody waits: rank 0 calls it by itself, and it must not need values
    of other ranks. A ModelCheckpoint that saves after so many batches does.
    """

    def __init__(self, callback: Any) -> None:
        super().__init__()
        self.callback = callback
        self._variables: list[tf.Variable] | None = None
        frequency = getattr(callback, "save_freq", "epoch")
        self._saves_by_batch = frequency != "epoch"

    def set_params(self, params: Any) -> None:
        super().set_params(params)
        if session.rank() == 0:
            self.callback.set_params(params)

    def set_model(self, model: Any) -> None:
        super().set_model(model)
        if session.rank() == 0:
            self.callback.set_model(model)

    def batch_hook(self, name: str, *arguments: Any, **named: Any) -> None:
        if self._saves_by_batch and name == "on_train_batch_end":
            self.hook(name, *arguments, **named)
        elif session.rank() == 0:
            getattr(self.callback, name)(*arguments, **named)

    def hook(self, name: str, *arguments: Any, **named: Any) -> None:
        """Every rank must call it."""

        def run() -> dict[str, Any]:
            getattr(self.callback, name)(*arguments, **named)
            return _figures(self.callback)

        placement = self.model.placement
        owner = {} if placement is None else placement.owner
        call = f"{type(self.callback).__name__}.{name}"
        with showing_all():
            figures = whole_values.on_first_rank(call, self._readable(), owner, run)
        vars(self.callback).update(figures)

    def _readable(self) -> list[tf.Variable]:
        """Found once, as every batch may ask; none before there are partitions."""
        if self.model.placement is None:
            return []
        if self._variables is None:
            self._variables = list(variables_of(self.model).values())
        return self._variables


def _figures(callback: Any) -> dict[str, Any]:
    """What it keeps that is plain data."""
    return {
        name: value
        for name, value in vars(callback).items()
        if isinstance(value, _FIGURES)
    }


def _delegated(name: str, is_batch: bool) -> Callable[..., None]:
    def method(self: OnFirstRank, *arguments: Any, **named: Any) -> None:
        run = self.batch_hook if is_batch else self.hook
        run(name, *arguments, **named)

    method.__name__ = name
    return method


for _name in (*_HOOKS, *_BATCH_HOOKS):
    setattr(OnFirstRank, _name, _delegated(_name, _name in _BATCH_HOOKS))


def refuse_alone(name: str) -> None:
    """A method that all ranks must call, called by a callback that runs on rank 0.

    Raises:
        SmpError: it is.
    """
    if whole_values.is_alone():
        raise SmpError(
            f"a callback that writes files runs on rank 0 only, where model.{name}"
            " would wait for the other ranks: call it in a callback derived from"
            " tf.keras.callbacks.Callback, which runs on every rank"
        )


# --- printing


class _NotOfKeras(logging.Filter):
    """Drops what Keras's loops and callbacks say by TensorFlow's logger."""

    _folder = os.path.dirname(os.path.realpath(inspect.getfile(tf.keras.Model)))
    _file = os.path.realpath(inspect.getfile(tf.keras.callbacks.Callback))

    def filter(self, record: logging.LogRecord) -> bool:
        path = os.path.realpath(record.pathname)
        return path != self._file and os.path.dirname(path) != self._folder


_not_of_keras = _NotOfKeras()


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """What Keras prints inside, and what it logs, shows on rank 0 only."""
    logger = tf.get_logger()
    if session.rank() == 0 or _not_of_keras in logger.filters:
        yield
        return
    is_printing = tf.keras.utils.is_interactive_logging_enabled()
    tf.keras.utils.disable_interactive_logging()
    logger.addFilter(_not_of_keras)
    try:
        yield
    finally:
        logger.removeFilter(_not_of_keras)
        if is_printing:
            tf.keras.utils.enable_interactive_logging()
