"""``shard_optimizer_state: true``: which replica has which slots.

Each trained variable of a partition is owned by one rank of the dp_group: its slots
(momentum, moving averages) exist there only, and there it is updated.
"""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from smp_tf.data_parallel.balance import balanced
from smp_tf.frontend.hooks import initial_values
from smp_tf.runtime import session

_OWNER = "_smp_state_owner"


def trains_together() -> bool:
    """Whether there are replicas of the model, and they average their gradients."""
    return session.config().horovod and session.dp_size() > 1


def is_sharded() -> bool:
    """Whether each optimizer slot is on one rank of the dp_group only."""
    return trains_together() and session.config().shard_optimizer_state


def owners(variables: Sequence[tf.Variable]) -> list[int]:
    """The dp_rank that has the slots of each variable.

    Every rank of the dp_group calls it with the same variables, those of its partition,
    in the same order; it sends nothing. The first call that a variable is in decides,
    by the bytes of all variables of that call: give it all that an optimizer trains.

    Returns:
        A dp_rank for each variable. 0 for all without ``shard_optimizer_state``: every
        rank has all slots then, so dp_rank 0 does.

    Raises:
        NotInitializedError: before ``smp.init()``.
    """
    current = session.current("owners")
    if not is_sharded():
        return [0] * len(variables)
    holders = [_holder(variable) for variable in variables]
    known = [getattr(holder, _OWNER, (None, 0)) for holder in holders]
    loads, new = [0] * session.dp_size(), []
    for place, (decided_in, owner) in enumerate(known):
        if decided_in is current:
            loads[owner] += _num_bytes(variables[place])
        else:
            new.append(place)
    sizes = [_num_bytes(variables[place]) for place in new]
    for place, owner in zip(new, balanced(sizes, loads), strict=True):
        # Set past Keras and TensorFlow, which track attributes of some objects.
        object.__setattr__(holders[place], _OWNER, (current, owner))
    return [getattr(holder, _OWNER)[1] for holder in holders]


def owned(variables: Sequence[tf.Variable]) -> list[tf.Variable]:
    """Those whose slots are on this rank; all without ``shard_optimizer_state``.

    As for ``owners``, every rank of the dp_group calls it with the same variables.
    """
    if not is_sharded():
        return list(variables)
    me = session.dp_rank()
    return [
        variable
        for variable, owner in zip(variables, owners(variables), strict=True)
        if owner == me
    ]


def _holder(variable: Any) -> Any:
    """The variable itself, whatever is wrapped around it."""
    found = initial_values.variable_of(variable.handle)
    return variable if found is None else found


def _num_bytes(variable: tf.Variable) -> int:
    return variable.dtype.size * (variable.shape.num_elements() or 0)
