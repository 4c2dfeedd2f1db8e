"""``smp.DistributedOptimizer``: replicas of a model that train as one.

    class of the optimizer    Adam
    becomes                   Adam(Distributed, Adam)

It stays the same object, with the same options, slots and checkpoint paths.
"""

import functools
import types
from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.data_parallel import sharding
from smp_tf.errors import ConfigError, SmpError
from smp_tf.frontend.hooks import optimizer_slots
from smp_tf.keras import updates
from smp_tf.keras.in_order import depends_on_order
from smp_tf.runtime import session


def DistributedOptimizer(optimizer: Any, compression: Any = None) -> Any:
    """Let an optimizer update with the mean of the gradients of all replicas.

        optimizer = smp.DistributedOptimizer(tf.keras.optimizers.Adam(0.01))

        @tf.function
        def train(x, y):
            gradients, loss = train_step(x, y)  # decorated with smp.step
            means = [gradient.accumulate() for gradient in gradients]
            optimizer.apply_gradients(zip(means, model.trainable_variables))

    Its ``apply_gradients`` averages over the dp_group, each gradient as soon as it is
    there, while the pipeline may still be busy with others. It knows the whole model
    where Keras would: ``global_clipnorm``, the count of updates, and whether all
    gradients are finite. All ranks of the job must call it alike. With
    ``shard_optimizer_state`` each slot is on one rank of the dp_group, which updates
    the variable; the others take over its value, and ``variables`` of the optimizer are
    those that all of them have: its counter, its learning rate.

    ``fit`` does so with ``horovod: true`` whether the optimizer was named or not. With
    one replica nothing is averaged.

    Args:
        optimizer: a Keras optimizer, new or legacy, or a LossScaleOptimizer, which goes
            inside: ``DistributedOptimizer(LossScaleOptimizer(optimizer))``. Is changed.
        compression: one of ``hvd.Compression``, for the gradients on their way; not
            for IndexedSlices.

    Returns:
        The same object; one that is distributed already comes back as it is, with the
        compression, if one is given.

    Raises:
        NotInitializedError: before ``smp.init()``.
        ConfigError: there are several replicas, and ``horovod`` is false.
        TypeError: no optimizer of Keras 2; no compression of Horovod.
    """
    session.current("DistributedOptimizer")
    if session.dp_size() > 1 and not session.config().horovod:
        raise ConfigError(
            "smp.DistributedOptimizer averages over the replicas of the model, which"
            f" needs Horovod: horovod=False dp_size={session.dp_size()}; set horovod to"
            " true in smp.init"
        )
    _require_optimizer(optimizer)
    if compression is not None and not hasattr(compression, "decompress"):
        raise TypeError(
            f"compression must be one of hvd.Compression: compression={compression!r}"
        )
    return distribute_optimizer(optimizer, compression)


def distribute_optimizer(optimizer: Any, compression: Any = None) -> Any:
    """``DistributedOptimizer``, for an optimizer that Keras has accepted."""
    if not isinstance(optimizer, Distributed):
        plain: Any = type(optimizer)
        # Set past Keras, which takes attributes for hyperparameters or tracks them.
        object.__setattr__(optimizer, "__class__", _distributed(plain))
    if compression is not None:
        object.__setattr__(optimizer, updates.COMPRESSION, compression)
    return optimizer


def _require_optimizer(optimizer: Any) -> None:
    known = (
        tf.keras.optimizers.Optimizer,
        tf.keras.optimizers.legacy.Optimizer,
        tf.keras.mixed_precision.LossScaleOptimizer,
    )
    if not isinstance(optimizer, known):
        raise TypeError(
            "smp.DistributedOptimizer takes an optimizer of Keras 2:"
            f" optimizer={optimizer!r}"
            f" type={type(optimizer).__module__}.{type(optimizer).__name__}; make one"
            " with tf.keras.optimizers, after `import smp_tf as smp`"
        )


class Distributed:
    """What a distributed optimizer does otherwise than the class it was made of."""

    def apply_gradients(self, grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
        """Average over the replicas and update, see ``smp.DistributedOptimizer``.

        Raises:
            SmpError: called inside a step; or the gradients are said to be averaged
                already, as a LossScaleOptimizer around it does.
        """
        plain: Any = super()
        if updates.is_updating():
            return plain.apply_gradients(grads_and_vars, *args, **kwargs)
        is_skipped = kwargs.get("skip_gradients_aggregation", False)
        if is_skipped or not kwargs.get("experimental_aggregate_gradients", True):
            raise SmpError(
                "a distributed optimizer averages all that it is given:"
                f" optimizer={type(self).__name__} arguments={sorted(kwargs)}; leave"
                " these arguments out, and around a loss scale put it outermost:"
                " smp.DistributedOptimizer(LossScaleOptimizer(optimizer))"
            )
        pairs = list(grads_and_vars)
        updates.apply_gradients(
            self,
            [gradient for gradient, _ in pairs],
            [variable for _, variable in pairs],
            are_unscaled=True,
        )
        return getattr(self, "iterations")

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies are plain optimizers."""
        found: Any = super().__reduce_ex__(protocol)
        if isinstance(found, str):
            return found
        function, arguments, *rest = found
        own: Any = type(self)
        plain = tuple(own._smp_plain if each is own else each for each in arguments)
        return (function, plain, *rest)


class DistributedLegacy(Distributed):
    """The same of a legacy optimizer."""

    def variables(self) -> list[tf.Variable]:
        """As Keras's; with ``shard_optimizer_state`` those that every replica has.

        Slots are those of other variables on each of them then, and a script that
        broadcasts its optimizer's variables must not give one the values of another.
        """
        return self.weights

    @property
    def weights(self) -> list[tf.Variable]:
        plain: Any = super()
        return _of_every_replica(self, plain.weights)


class DistributedNew(Distributed):
    """The same of a new optimizer, which has more to say of its variables."""

    @property
    def variables(self) -> list[tf.Variable]:
        """See ``DistributedLegacy.variables``."""
        plain: Any = super()
        return _of_every_replica(self, plain.variables)

    def build(self, var_list: Iterable[tf.Variable]) -> None:
        """As Keras's, for those variables whose slots are on this rank."""
        mine = list(var_list)
        if not updates.is_updating() and session.is_initialized():
            if sharding.is_sharded() and depends_on_order(self):
                return  # the first update does it, with what stands for the others'
            mine = sharding.owned(mine)
        plain: Any = super()
        plain.build(mine)

    def finalize_variable_values(self, var_list: Sequence[tf.Variable]) -> None:
        """As Keras's, at the end of a training; every rank of the dp_group calls it."""
        plain: Any = super()
        plain.finalize_variable_values(sharding.owned(var_list))
        if getattr(self, "use_ema", False):
            updates.spread_values(var_list)


def _of_every_replica(optimizer: Any, variables: Any) -> list[tf.Variable]:
    """Those of an optimizer's variables that each replica has; in a list of the same
    type, which Keras lets scripts call."""
    if not (session.is_initialized() and sharding.is_sharded()):
        found: list[tf.Variable] = variables
        return found
    slots = {id(slot) for slot in optimizer_slots.every_slot(optimizer)}
    kind: Any = type(variables)
    found = kind(each for each in variables if id(each) not in slots)
    return found


@functools.cache
def _distributed(plain: type) -> type:
    """The class of distributed optimizers that were of class ``plain``.

    It has the name of ``plain``, which configs and checkpoints hold; and its instances
    are only made by ``distribute_optimizer``: called as a class it gives a plain one.
    """

    def new(_: type, *args: Any, **kwargs: Any) -> Any:
        return plain(*args, **kwargs)

    namespace = {
        "__new__": new,
        "_smp_plain": plain,
        "__doc__": plain.__doc__,
        "__module__": plain.__module__,
        "__qualname__": plain.__qualname__,
    }
    # What Keras's optimizers are exported as, so that configs name that.
    exported = [name for name in vars(plain) if "_api_names" in name]
    namespace.update({name: vars(plain)[name] for name in exported})
    is_new = hasattr(plain, "finalize_variable_values")
    return types.new_class(
        plain.__name__,
        (DistributedNew if is_new else DistributedLegacy, plain),
        exec_body=lambda found: found.update(namespace),
    )
