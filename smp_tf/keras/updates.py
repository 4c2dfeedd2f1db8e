"""A Keras optimizer updates one partition, with what it must know of all of them.

Each rank gives the optimizer its own gradients and variables, so that slots exist where
the variables are. What Keras would take from the whole list comes from the other ranks:

- ``global_clipnorm``: the norm of all gradients of the model;
- a dynamic ``LossScaleOptimizer``: whether all gradients of the model are finite;
- the count of updates, which also drives schedules: it advances on every rank, also on
  one without a gradient, to which Keras's ``apply_gradients`` does nothing at all.

Both sums travel in one message. Everything else is the business of one gradient and its
variable, and the optimizer does it as ever.

With ``horovod: true`` all that begins with means over the dp_group, which are the same
on its ranks, and so is what follows. With ``shard_optimizer_state`` each mean goes to
one rank of it, which updates; sums are over all ranks of the job then, and the others
take over the new values.

    gradients -> means over the dp_group -> clipped, checked -> update -> (new values)
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.data_parallel import sharding
from smp_tf.data_parallel.exchange import exchange_for
from smp_tf.frontend.hooks import graphs, loss_scales
from smp_tf.keras.clips import Clip
from smp_tf.keras.finite import num_not_finite, with_nan_if
from smp_tf.keras.in_order import InOrder, depends_on_order
from smp_tf.keras.same_optimizer import compare
from smp_tf.runtime import session
from smp_tf.runtime.clipping import half_squared_norm
from smp_tf.runtime.collectives import group_sum, members, refuse_in_step
from smp_tf.runtime.session import CommGroup

COMPRESSION = "_smp_compression"
"""Attribute of an optimizer: what its gradients are compressed with on their way."""

_is_updating = contextvars.ContextVar("_is_updating", default=False)


def is_updating() -> bool:
    """True inside an update: what the optimizer is given is complete."""
    return _is_updating.get()


@graphs.unconverted
def apply_gradients(
    optimizer: Any,
    gradients: Sequence[Any],
    variables: Sequence[tf.Variable],
    every: Sequence[tf.Variable] = (),
    are_unscaled: bool = False,
) -> None:
    """Update this rank's variables, as plain Keras would in the whole model.

    Every rank of the pp_group, and with ``horovod: true`` of the job, calls it once for
    each batch, eagerly or inside a ``tf.function``.

    Args:
        optimizer: any Keras optimizer, new or legacy, or a LossScaleOptimizer around
            one; the same on all ranks.
        gradients: of the mean loss (times the loss scale, if any); Tensors,
            IndexedSlices or None, one for each variable. May be empty.
        variables: those of this rank's partition.
        every: all trained variables of the model in order, which some optimizers need
            to know; see ``in_order``.
        are_unscaled: the loss scale has been taken out of the gradients.

    Raises:
        SmpError: on every rank, the ranks have different optimizers, or replicas other
            gradients; a variable is of another partition; or it is called while a step
            is traced.
        TraceError: on every rank, no variable of the model has a gradient.
        tf.errors.OpError: when it runs: a rank failed or did not come; named.
    """
    refuse_in_step("apply_gradients")
    gradients, variables = list(gradients), list(variables)
    compare(optimizer, gradients, variables)
    exchange = None
    if sharding.trains_together():
        compression = getattr(optimizer, COMPRESSION, None)
        exchange = exchange_for(gradients, variables, compression)
    is_ordered = depends_on_order(optimizer) and (
        sharding.is_sharded() or (bool(every) and session.pp_size() > 1)
    )
    order = InOrder(optimizer, gradients, variables, every) if is_ordered else None
    mine, places = gradients, variables
    if exchange is not None:
        mine = exchange.averaged(gradients)
    if sharding.is_sharded():
        mine, places = _owned(mine, variables)
    if _is_scaled(optimizer) and not are_unscaled:
        mine = optimizer.get_unscaled_gradients(mine)
    group = session.WORLD if sharding.is_sharded() else session.PP_GROUP
    _update(optimizer, mine, places, order, group, optimizer.apply_gradients)
    if exchange is not None:  # nothing to do where each replica has updated all
        exchange.spread(variables)


def apply_as_given(
    optimizer: Any,
    gradients: Sequence[Any],
    variables: Sequence[tf.Variable],
    plainly: Callable[[list[Any]], Any],
) -> None:
    """Update with gradients as they are: not scaled any more, and averaged by whoever
    has replicas. Every rank of the pp_group calls it.

    Args:
        plainly: Keras's own ``apply_gradients`` of the optimizer.

    Raises:
        As ``apply_gradients``.
    """
    gradients, variables = list(gradients), list(variables)
    compare(optimizer, gradients, variables, session.PP_GROUP)
    _update(optimizer, gradients, variables, None, session.PP_GROUP, plainly)


def needs_whole_model(optimizer: Any) -> bool:
    """Whether the optimizer asks what is known of all gradients only: if they are
    finite, or their norm."""
    return _is_checked(optimizer) or _clip_of(optimizer).is_needed


def spread_values(variables: Sequence[tf.Variable]) -> None:
    """Set variables to the values that they have on the ranks that own them. Every rank
    of the dp_group calls it, with the same variables."""
    if sharding.is_sharded():
        exchange_for(variables, variables).spread(variables)


def _owned(
    gradients: Sequence[Any], variables: Sequence[tf.Variable]
) -> tuple[list[Any], list[tf.Variable]]:
    """The pairs of what this rank owns."""
    owned = {id(variable) for variable in sharding.owned(variables)}
    pairs = [
        (gradient, variable)
        for gradient, variable in zip(gradients, variables)
        if id(variable) in owned
    ]
    return [gradient for gradient, _ in pairs], [variable for _, variable in pairs]


def _update(
    optimizer: Any,
    gradients: list[Any],
    variables: list[tf.Variable],
    order: InOrder | None,
    group: CommGroup,
    apply: Callable[[list[Any]], Any],
) -> None:
    """The optimizer's update, from this rank's share of the model's gradients.

    Args:
        group: ranks that have a share each.
        apply: the optimizer's ``apply_gradients``.
    """
    if len(members(group)) == 1:
        with _updating():
            apply(list(zip(gradients, variables, strict=True)))
        return
    clip = _clip_of(optimizer)
    gradients, is_bad = _with_sums(gradients, clip, _is_checked(optimizer), group)
    if order is None and all(gradient is None for gradient in gradients):
        with _updating():
            _count_only(optimizer, variables, is_bad)
        return
    if order is not None:
        gradients, variables = order.with_scalars(gradients, variables)
    if is_bad is not None:
        gradients = with_nan_if(is_bad, gradients)
    with clip.done(), _updating():
        apply(list(zip(gradients, variables, strict=True)))


@contextlib.contextmanager
def _updating() -> Iterator[None]:
    token = _is_updating.set(True)
    try:
        yield
    finally:
        _is_updating.reset(token)


def _with_sums(
    gradients: Sequence[Any], clip: Clip, is_checked: bool, group: CommGroup
) -> tuple[list[Any], tf.Tensor | None]:
    """(the gradients, clipped by their global norm; whether any in the model is not
    finite, None if nobody asks)."""
    summed = []
    if is_checked:
        summed.append(num_not_finite(gradients))
    if clip.is_needed:
        gradients = clip.each(gradients)
        summed.append(half_squared_norm(gradients))
    if not summed:
        return list(gradients), None
    totals = tf.unstack(group_sum(tf.stack(summed), group, "a sum over all gradients"))
    if clip.is_needed:
        gradients = clip.all(gradients, totals[-1])
    if not is_checked:
        return list(gradients), None
    # A norm beyond all numbers turns finite gradients into NaN.
    is_good = tf.logical_and(totals[0] <= 0.0, tf.math.is_finite(totals[-1]))
    return list(gradients), tf.logical_not(is_good)


def _is_scaled(optimizer: Any) -> bool:
    return isinstance(optimizer, tf.keras.mixed_precision.LossScaleOptimizer)


def _is_checked(optimizer: Any) -> bool:
    return _is_scaled(optimizer) and bool(optimizer.dynamic)


def _clip_of(optimizer: Any) -> Clip:
    return Clip(getattr(optimizer, "inner_optimizer", optimizer))


# --- ranks without gradients


def _count_only(
    optimizer: Any, variables: Sequence[tf.Variable], is_bad: tf.Tensor | None
) -> None:
    """What the other ranks' optimizers do besides their updates."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    is_new = isinstance(inner, tf.keras.optimizers.Optimizer)
    with tf.init_scope():
        if is_new and variables:
            inner.build(variables)
        iterations = inner.iterations  # a legacy optimizer makes it here

    def schedule() -> None:
        if is_new:
            # Keras's own method, that of an empty list: it takes the learning rate from
            # the schedule. A subclass may not expect the list to be empty.
            tf.keras.optimizers.Optimizer.apply_gradients(
                inner, [], skip_gradients_aggregation=True
            )

    if is_bad is None:
        schedule()
    else:
        nan = tf.constant(float("nan"))
        loss_scales.move(optimizer, [tf.where(is_bad, nan, 0.0)])
        tf.cond(is_bad, lambda: None, schedule)
    iterations.assign_add(1)
