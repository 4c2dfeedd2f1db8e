"""What a rank's backup of a training holds."""

import hashlib
import json
from typing import Any

import tensorflow as tf

from smp_tf.data_parallel import sharding
from smp_tf.errors import ConfigError
from smp_tf.frontend.hooks import fitting
from smp_tf.frontend.variables import owner_elsewhere
from smp_tf.keras.in_order import depends_on_order
from smp_tf.keras.model_state import variables_of
from smp_tf.runtime import session
from smp_tf.runtime.random_counters import counters_of


class State:
    """The variables that this rank has, its optimizer, the count of batches and random
    counters, as a checkpoint.

    Of a checkpoint that is read, the variables that do not exist yet get their value
    when they are attached, and the optimizer's when it makes them.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._variables = tf.train.Checkpoint()
        self.checkpoint = tf.train.Checkpoint(
            variables=self._variables,
            optimizer=model.optimizer,
            step=fitting.counter_of(model, "train"),
            random=_Counters(model),
        )

    def attach(self, with_metrics: bool) -> None:
        """Take in the variables, once the model has been partitioned."""
        for name, variable in variables_of(self._model).items():
            if with_metrics or not name.startswith("metric"):
                if owner_elsewhere(variable) is None:
                    setattr(self._variables, name, variable)

    def read(self, path: str) -> None:
        # Not all of it is there yet, and the metrics may be left out.
        self.checkpoint.read(path).expect_partial()

    def restore(self, identity: str, with_metrics: bool) -> None:
        """The model has been partitioned: take what was read.

        Raises:
            ConfigError: otherwise than when the backup was made.
        """
        model = self._model
        if identity != identity_of(model):
            raise ConfigError(
                "a backup is of the same model on the same ranks with the same"
                f" partition: model={model.name!r} rank={session.rank()}"
                f" size={session.size()}; start the training as it was, with a"
                " partition_file if the partition was measured, or remove the backup"
            )
        optimizer = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        is_new = isinstance(optimizer, tf.keras.optimizers.Optimizer)
        if is_new and not depends_on_order(optimizer):
            optimizer.build(sharding.owned(model.trainable_variables))
        self.attach(with_metrics)


class _Counters(tf.train.experimental.PythonState):
    """What the random operations of the model's steps count with."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._counters = counters_of(model)

    def serialize(self) -> str:
        return json.dumps(self._counters.states())

    def deserialize(self, string_value: Any) -> None:
        self._counters.take_over(json.loads(string_value))


def identity_of(model: Any) -> str:
    """A text for the model and its partition, and this rank's place in the job."""
    text = [f"rank {session.rank()} of {session.size()}, pp_size {session.pp_size()}"]
    text += [
        f"{spec.shape} {spec.dtype} {spec.partition}"
        for spec in model.global_variable_specs
    ]
    return hashlib.sha256("\n".join(text).encode()).hexdigest()
