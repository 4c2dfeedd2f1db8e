"""Which callbacks attend a ``fit``, ``evaluate`` or ``predict``, and in which order.

    Resume        restores a backup           } with a BackupAndRestore
    figures       what adds to the logs       MemoryCallback, PipelineMetricsCallback
    the others    as they were given          see ``once``
    Agreement     what they decided holds on every rank
    Backup        saves it                    } with a BackupAndRestore
    History and the progress bar, of Keras
"""

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from smp_tf.keras import backup, once
from smp_tf.keras.agreement import Agreement
from smp_tf.keras.callbacks.figures import Figures

_List = tf.keras.callbacks.CallbackList


def class_names(callbacks: Any) -> list[str]:
    """Of the callbacks that a method of a model was given."""
    every = callbacks.callbacks if isinstance(callbacks, _List) else callbacks
    return [type(each).__name__ for each in tf.nest.flatten(every)]


def attended(model: Any, call: str, arguments: Mapping[str, Any]) -> Any:
    """The callbacks that Keras shall call.

    Args:
        call: "fit", "evaluate" or "predict".
        arguments: of the call, by name.

    Raises:
        ConfigError: a callback cannot work with a DistributedModel.
    """
    given = arguments.get("callbacks")
    if isinstance(given, _List):
        given = given.callbacks
        if any(isinstance(each, Agreement) for each in given):  # those of fit
            return arguments["callbacks"]
    every = [] if given is None else tf.nest.flatten(given)
    stocks = []
    if call == "fit" and not model.run_eagerly:
        stocks = [each for each in every if backup.is_stock(each)]
    backups = [backup.Backup(stock, arguments) for stock in stocks]
    others = [each for each in every if not any(each is stock for stock in stocks)]
    others.sort(key=lambda each: not isinstance(each, Figures))
    return [
        *(each.first for each in backups),
        *once.on_first_rank(others),
        Agreement(has_others=bool(every)),
        *backups,
    ]
