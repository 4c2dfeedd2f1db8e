"""``smp.DistributedModel``: a Keras model that is spread over the mp_group."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.errors import SmpError
from smp_tf.frontend import variables
from smp_tf.frontend.hooks import recording
from smp_tf.keras import one_by_one, own_loops
from smp_tf.keras.summary import Summary
from smp_tf.keras.training import Training
from smp_tf.keras.whole_model import WholeModel
from smp_tf.keras.whole_weights import is_showing_all, showing_all
from smp_tf.plan.profile import Profile
from smp_tf.runtime import session
from smp_tf.runtime.placement import Placement
from smp_tf.runtime.planning import profile_model


def _deferring_variables(function: Callable[..., Any]) -> Callable[..., Any]:
    """``__init__`` and ``build`` of a model: the variables they create wait."""

    @functools.wraps(function)
    def method(self: "DistributedModel", *args: Any, **kwargs: Any) -> Any:
        with self._deferring():
            return function(self, *args, **kwargs)

    return tf.__internal__.decorator.make_decorator(function, method)


def _is_functional(args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Whether a model is made from the tensors of Keras's functional API."""
    given = tf.nest.flatten([*args, kwargs.get("inputs"), kwargs.get("outputs")])
    is_keras_tensor = tf.keras.backend.is_keras_tensor
    return any(tf.is_tensor(each) and is_keras_tensor(each) for each in given)


def _variables(weights: list[Any]) -> list[tf.Variable]:
    """Without the tables that TextVectorization and its like list among their weights;
    every rank has them."""
    return [each for each in weights if hasattr(each, "handle")]


class CalledOutsideStepError(SmpError, NotImplementedError):
    """Keras calls a model that is not built yet with the first batch of a generator,
    and goes on after a NotImplementedError: the step will build it."""


own_loops.divert()


class DistributedModel(Training, WholeModel, Summary):
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
    _smp_waiting: tuple[Callable[[], None], ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        for name in ("__init__", "build"):
            if name in cls.__dict__:
                setattr(cls, name, _deferring_variables(cls.__dict__[name]))

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if _is_functional(args, kwargs):
            # Keras would put its class Functional under the classes of all models.
            raise TypeError(
                "a class on smp.DistributedModel defines `call`; it is not made from"
                f" inputs and outputs: class={type(self).__name__}; write"
                " smp.distribute(tf.keras.Model(inputs, outputs))"
            )
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
        if not recording.is_tracing() and not one_by_one.is_open():
            session.current(f"DistributedModel ({self.name})")
            raise CalledOutsideStepError(
                "a DistributedModel is called inside a function decorated with"
                " smp.step, where its partitions run in a pipeline:"
                f" model={self.name!r}; a train_step, test_step or predict_step of your"
                " own needs such a function, too; model.save_model exports the model"
            )
        with self._deferring():
            return super().__call__(*args, **kwargs)

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
        waiting = self._smp_waiting
        object.__setattr__(self, "_smp_waiting", ())
        with tf.init_scope():
            for function in waiting:
                function()

    def when_placed(self, function: Callable[[], None]) -> None:
        """Call ``function`` when a step has partitioned the model, before the step runs
        for the first time; at once if one has."""
        if self.placement is not None:
            function()
            return
        object.__setattr__(self, "_smp_waiting", (*self._smp_waiting, function))

    @property
    def global_variables(self) -> list[tf.Variable]:
        """All variables of the model, of all partitions."""
        with showing_all():
            return _variables(super().weights)

    @property
    def global_trainable_variables(self) -> list[tf.Variable]:
        """All variables that are trained, of all partitions."""
        with showing_all():
            return _variables(super().trainable_weights)

    def _local(self, every: list[tf.Variable]) -> list[tf.Variable]:
        placement = self.placement
        if placement is None or recording.is_tracing() or is_showing_all():
            return every
        mine = session.pp_rank()
        return [
            variable
            for variable in every
            if placement.owner.get(id(getattr(variable, "handle", None)), mine) == mine
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
