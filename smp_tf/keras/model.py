"""``smp.DistributedModel``: a Keras model that is spread over the mp_group."""

from typing import Any

import tensorflow as tf

from smp_tf.errors import SmpError
from smp_tf.frontend import hooks
from smp_tf.runtime import session
from smp_tf.runtime.placement import Placement


class DistributedModel(tf.keras.Model):
    """Subclass it instead of ``tf.keras.Model``; define ``__init__`` and ``call``.

    The model is partitioned when the first ``smp.step`` that calls it is built. From
    then on ``variables``, ``trainable_variables``, ``weights`` and friends are those of
    this rank's partition, in the order of the whole model; while a step is traced they
    are all of them, so that every rank traces the same graph. ``global_variables`` are
    always all of them.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Set past Keras, which would track it as part of the model.
        object.__setattr__(self, "_smp_placement", None)
        super().__init__(*args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        session.current(f"DistributedModel ({self.name})")
        if not hooks.is_tracing():
            raise SmpError(
                "a DistributedModel is called inside a function decorated with"
                " smp.step, where its partitions run in a pipeline:"
                f" model={self.name!r}"
            )
        return super().__call__(*args, **kwargs)

    # -- placement
    # -------------------------------------------------------------------------------

    @property
    def placement(self) -> Placement | None:
        """Where the variables are; None before the first step is built."""
        found: Placement | None = self._smp_placement
        return found if found is not None and found.is_current() else None

    def place(self, placement: Placement) -> None:
        """Called once by the step that partitions the model."""
        object.__setattr__(self, "_smp_placement", placement)

    @property
    def global_variables(self) -> list[tf.Variable]:
        """All variables of the model, of all partitions."""
        return list(super().weights)

    def _local(self, variables: list[tf.Variable]) -> list[tf.Variable]:
        placement = self.placement
        if placement is None or hooks.is_tracing():
            return variables
        mine = session.pp_rank()
        return [
            variable
            for variable in variables
            if placement.owner.get(id(variable.handle), mine) == mine
        ]

    @property
    def weights(self) -> list[tf.Variable]:
        return self._local(super().weights)

    @property
    def trainable_weights(self) -> list[tf.Variable]:
        return self._local(super().trainable_weights)

    @property
    def non_trainable_weights(self) -> list[tf.Variable]:
        return self._local(super().non_trainable_weights)


setattr(DistributedModel, hooks.DISTRIBUTED_MARK, True)
