"""Replicas of a model that train together under ``fit`` (``horovod: true``).

    before the first batch     all take over the variables of the first replica
    at the end of an epoch,    metrics are those of all batches of all replicas, so
    and of ``evaluate``        that callbacks decide alike

Between, each replica works on batches of its own, and the optimizer averages gradients.
"""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.data_parallel import sharding
from smp_tf.frontend.variables import owner_elsewhere
from smp_tf.keras import meeting
from smp_tf.keras.model_state import variables_of
from smp_tf.runtime import session

_ALIGNED = "_smp_aligned_in"


def align(model: Any) -> None:
    """Begin the first training of ``model`` in this session with the same variables on
    all replicas: those of the first one, as soon as they exist. All ranks call it."""
    current = session.current("fit")
    if not meeting.are_replicas_in_step() or getattr(model, _ALIGNED, None) is current:
        return
    # Set past Keras, which would track it as part of the model.
    object.__setattr__(model, _ALIGNED, current)
    model.when_placed(lambda: take_over(model, 0))


def take_over(model: Any, root_rank: int) -> None:
    """Set the variables of ``model``, and of its optimizer as far as they exist, to
    those that the replica ``root_rank`` has. Every rank of the job calls it."""
    every = variables_of(model).values()
    own = [variable for variable in every if owner_elsewhere(variable) is None]
    # One by one: no more than one is in the host's memory at a time.
    for variable in [*own, *_state_of(model.optimizer)]:
        if session.dp_rank() == root_rank:
            session.broadcast(variable.numpy(), session.DP_GROUP)
        else:
            variable.assign(session.recv_from(root_rank, session.DP_RANK))


def _state_of(optimizer: Any) -> list[tf.Variable]:
    if sharding.is_sharded():  # slots exist once, there is nothing to align
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        names = ("iterations", "learning_rate", "loss_scale", "dynamic_counter")
        every = [getattr(optimizer, name, getattr(inner, name, None)) for name in names]
        return [each for each in every if isinstance(each, tf.Variable)]
    found = getattr(optimizer, "variables", [])
    return list(found() if callable(found) else found)


@contextlib.contextmanager
def summed(metrics: Sequence[Any]) -> Iterator[None]:
    """Inside, metrics have counted the batches of all replicas: their variables are
    added up, as ``tf.distribute`` does it."""
    if not (meeting.is_open() and meeting.are_replicas_in_step()):
        yield
        return
    variables = [
        variable
        for metric in metrics
        for variable in metric.variables
        if variable.dtype.is_floating or variable.dtype.is_integer
    ]
    mine = [variable.numpy() for variable in variables]
    every = session.allgather(mine, session.DP_GROUP)
    for variable, values in zip(variables, zip(*every, strict=True), strict=True):
        variable.assign(sum(values[1:], values[0]))
    try:
        yield
    finally:
        for variable, value in zip(variables, mine, strict=True):
            variable.assign(value)
