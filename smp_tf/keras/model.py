"""``smp.DistributedModel``: a Keras model that is spread over the mp_group."""

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf

from smp_tf.errors import SmpError
from smp_tf.frontend import variables
from smp_tf.frontend.hooks import recording
from smp_tf.plan.profile import Profile
from smp_tf.runtime import session
from smp_tf.runtime.placement import Placement
from smp_tf.runtime.planning import profile_model

_is_showing_all = contextvars.ContextVar("_is_showing_all", default=False)
"""True while global variables are listed; for the DistributedModels inside of one."""

_ONLY_PART = (
    "this rank has the values of its own partition only; call it before the first step,"
    " or use model.variables on each rank"
)


@contextlib.contextmanager
def _showing_all() -> Iterator[None]:
    token = _is_showing_all.set(True)
    try:
        yield
    finally:
        _is_showing_all.reset(token)


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
                f" {remedy}{'' if always else self._first_elsewhere()}"
            )
        return whole(self, *args, **kwargs)

    return method


def _deferring_variables(function: Callable[..., Any]) -> Callable[..., Any]:
    """``__init__`` and ``build`` of a model: the variables they create wait."""

    @functools.wraps(function)
    def method(self: "DistributedModel", *args: Any, **kwargs: Any) -> Any:
        with self._deferring():
            return function(self, *args, **kwargs)

    return tf.__internal__.decorator.make_decorator(function, method)


class DistributedModel(tf.keras.Model):
    """Subclass it instead of ``tf.keras.Model``; define ``__init__`` and ``call``.

    The model is partitioned when the first ``smp.step`` that calls it is built. From
    then on ``variables``, ``trainable_variables``, ``weights`` and friends are those of
    this rank's partition, in the order of the whole model; while a step is traced they
    are all of them, so that every rank traces the same graph. ``global_variables`` are
    always all of them.

    Variables take no memory before that, and then only on the rank that owns them; see
    ``smp.delay_param_initialization``. Reading one of another partition raises.
    """

    _smp_placement: Placement | None = None
    _smp_is_deferring: bool | None = None
    _smp_measured: Profile | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("__init__", "build"):
            if name in cls.__dict__:
                setattr(cls, name, _deferring_variables(cls.__dict__[name]))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        with self._deferring():
            super().__init__(*args, **kwargs)

    @contextlib.contextmanager
    def _deferring(self) -> Iterator[None]:
        """Variables made inside are deferred, unless it was switched off around this or
        when the model was made."""
        with variables.deferring(self._smp_is_deferring is not False) as enabled:
            if self._smp_is_deferring is None:
                # Set past Keras, which would track it as part of the model.
                object.__setattr__(self, "_smp_is_deferring", enabled)
            yield

    def build(self, input_shape: Any) -> None:
        with self._deferring():
            super().build(input_shape)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not recording.is_tracing():
            session.current(f"DistributedModel ({self.name})")
            raise SmpError(
                "a DistributedModel is called inside a function decorated with"
                " smp.step, where its partitions run in a pipeline:"
                f" model={self.name!r}"
            )
        with self._deferring():
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

    # --- profile

    def profile(self, inputs: Any) -> Profile:
        """Measure the layers, for the partition: instead of the cost model's estimates.

            print(smp.profile_table(model.profile(images)))

        Runs the forward and the backward pass of one microbatch in this process, layer
        by layer and a few times, with the sum of the outputs as the loss. Each layer's
        variables exist only while it runs, and nothing of the model changes. Steps that
        partition the model later, and ``smp.plan``, use what was measured; on all
        ranks, even if only one of them has called this.

        Args:
            inputs: what the model is called with, a tuple for several arguments: a
                batch, that divides into the configuration's microbatches; before
                ``smp.init`` one microbatch.

        Raises:
            SmpError: a step has partitioned the model already, or it cannot be
                measured.
            MicrobatchError: the batch does not divide into microbatches.
        """
        if self.placement is not None:
            raise SmpError(
                "model.profile comes before the first step, which decides the"
                f" partition: model={self.name!r}"
            )
        # Set past Keras, which would track it as part of the model.
        object.__setattr__(self, "_smp_measured", profile_model(self, inputs))
        assert self.measured is not None
        return self.measured

    @property
    def measured(self) -> Profile | None:
        """What ``profile`` has returned; None if it was not called."""
        return self._smp_measured

    # --- placement

    @property
    def placement(self) -> Placement | None:
        """Where the variables are; None before the first step is built."""
        found = self._smp_placement
        return found if found is not None and found.is_current() else None

    def place(self, placement: Placement) -> None:
        """Called once by the step that partitions the model."""
        object.__setattr__(self, "_smp_placement", placement)

    @property
    def global_variables(self) -> list[tf.Variable]:
        """All variables of the model, of all partitions."""
        with _showing_all():
            return list(super().weights)

    @property
    def global_trainable_variables(self) -> list[tf.Variable]:
        """All variables that are trained, of all partitions."""
        with _showing_all():
            return list(super().trainable_weights)

    def _first_elsewhere(self) -> str:
        """For an error's text."""
        for variable in self.global_variables:
            owner = variables.owner_elsewhere(variable)
            if owner is not None:
                return f"; variable={variable.name!r} is on partition={owner}"
        return ""

    def _local(self, every: list[tf.Variable]) -> list[tf.Variable]:
        placement = self.placement
        if placement is None or recording.is_tracing() or _is_showing_all.get():
            return every
        mine = session.pp_rank()
        return [
            variable
            for variable in every
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


setattr(DistributedModel, recording.DISTRIBUTED_MARK, True)
# Keras calls no ``build`` with this mark by itself: it would call the model.
setattr(DistributedModel.build, "_is_default", True)
