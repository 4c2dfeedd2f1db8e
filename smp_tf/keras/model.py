"""``smp.DistributedModel``: a Keras model that is spread over the mp_group."""

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from smp_tf.errors import SmpError
from smp_tf.frontend import hooks
from smp_tf.runtime import session
from smp_tf.runtime.placement import Placement

_is_showing_all = contextvars.ContextVar("_is_showing_all", default=False)
"""True while global variables are listed; for the DistributedModels inside of one."""

_ONLY_PART = (
    "this rank has the values of its own partition only; call it before the first step,"
    " or use model.variables on each rank"
)


def _refuse(name: str, remedy: str, always: bool) -> Callable[..., Any]:
    """A method of ``tf.keras.Model`` that would take part of a model for all of it, or
    that would call the model outside a step."""
    whole = getattr(tf.keras.Model, name)

    @functools.wraps(whole)
    def method(self: "DistributedModel", *args: Any, **kwargs: Any) -> Any:
        is_split = self.placement is not None and session.pp_size() > 1
        if always or is_split:
            raise NotImplementedError(
                f"DistributedModel.{name} does not work yet: model={self.name!r};"
                f" {remedy}"
            )
        return whole(self, *args, **kwargs)

    return method


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

    # --- what does not work yet, and must not seem to

    fit, evaluate, predict, train_on_batch, test_on_batch, predict_on_batch = (
        _refuse(name, "write a train step with smp.step", always=True)
        for name in (
            "fit",
            "evaluate",
            "predict",
            "train_on_batch",
            "test_on_batch",
            "predict_on_batch",
        )
    )
    get_weights, set_weights, save, save_weights, load_weights = (
        _refuse(name, _ONLY_PART, always=False)
        for name in (
            "get_weights",
            "set_weights",
            "save",
            "save_weights",
            "load_weights",
        )
    )

    # --- placement

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
        token = _is_showing_all.set(True)
        try:
            return list(super().weights)
        finally:
            _is_showing_all.reset(token)

    def _local(self, variables: list[tf.Variable]) -> list[tf.Variable]:
        placement = self.placement
        if placement is None or hooks.is_tracing() or _is_showing_all.get():
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
