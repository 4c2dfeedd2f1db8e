"""The ranks that train together have the same optimizer, and their own variables."""

import weakref
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from smp_tf.data_parallel import sharding
from smp_tf.errors import SmpError, TraceError
from smp_tf.frontend.variables import owner_elsewhere
from smp_tf.keras.clips import options_of
from smp_tf.runtime import session
from smp_tf.runtime.collectives import members
from smp_tf.runtime.session import CommGroup

_seen: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""Optimizers that the ranks have compared, with the session in which they did."""


def compare(
    optimizer: Any,
    gradients: Sequence[Any],
    variables: Sequence[tf.Variable],
    group: CommGroup | None = None,
) -> None:
    """Once for each optimizer: the ranks have the same one, and something to do.

    Otherwise one rank would wait for a sum that the others do not take part in.

    Args:
        group: the ranks that compare; None for all that train together.

    Raises:
        SmpError: on every rank, the optimizers differ, or a variable is of another
            partition.
        TraceError: on every rank, no variable of the model has a gradient.
    """
    current = session.current("apply_gradients")
    if group is None:
        group = session.WORLD if sharding.trains_together() else session.PP_GROUP
    ranks = members(group)
    if _seen.get(optimizer) is current or len(ranks) == 1:
        return
    mine = (
        (_name(optimizer), _options(optimizer)),
        any(each is not None for each in gradients),
        _wrong(gradients, variables),
    )
    found = list(zip(ranks, session.allgather(mine, group), strict=True))
    kinds = [kind for _, (kind, _, _) in found]
    if any(kind != mine[0] for kind in kinds):
        raise SmpError(
            "all ranks that train together must do it with the same optimizer, with the"
            f" same options: {_differences(ranks, kinds)}; make it in code that all"
            " ranks run alike"
        )
    if any(wrong for _, (_, _, wrong) in found):
        problems = [(rank, wrong) for rank, (_, _, wrong) in found if wrong]
        each = "; ".join(f"rank {rank}: {wrong}" for rank, wrong in problems)
        raise SmpError(
            "apply_gradients takes a gradient for each variable of the rank's own"
            f" partition: {each}; take them from the step, and the variables from"
            " model.trainable_variables"
        )
    if not any(has_gradients for _, (_, has_gradients, _) in found):
        raise TraceError(
            "no variable of the model has a gradient, on any rank: optimizer="
            f"{mine[0][0]} ranks={list(ranks)}; the loss must depend on a trainable"
            " variable"
        )
    _seen[optimizer] = current


def _wrong(gradients: Sequence[Any], variables: Sequence[tf.Variable]) -> str:
    """What does not fit; "" if all does."""
    if len(gradients) != len(variables):
        return f"gradients={len(gradients)} variables={len(variables)}"
    for variable in variables:
        owner = owner_elsewhere(variable)
        if owner is not None:
            return f"variable={variable.name!r} partition={owner}"
    return ""


def _name(optimizer: Any) -> str:
    inner = getattr(optimizer, "inner_optimizer", None)
    name = type(optimizer).__name__
    return name if inner is None else f"{name}({_name(inner)})"


def _options(optimizer: Any) -> dict[str, Any]:
    """What it was made with, as far as that is plain data; clipping options always."""
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    try:
        with tf.init_scope():  # it reads the learning rate
            config = optimizer.get_config()
    except Exception:  # a class of the user's, or its schedule, has none
        config = {}
    return {**_plain(config), **options_of(inner)}


def _plain(value: Any) -> Any:
    """``value`` without what has no text that is the same on all ranks."""
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    if isinstance(value, np.generic):
        return value.item()
    is_plain = value is None or isinstance(value, (bool, int, float, str))
    return value if is_plain else type(value).__name__


def _differences(
    ranks: Sequence[int], kinds: Sequence[tuple[str, dict[str, Any]]]
) -> str:
    """Names and options of each rank; of the latter those that are not alike."""
    keys = sorted({key for _, options in kinds for key in options})
    differ = [
        key
        for key in keys
        if any(options.get(key) != kinds[0][1].get(key) for _, options in kinds)
    ]
    texts = []
    for rank, (name, options) in zip(ranks, kinds, strict=True):
        listed = ", ".join(f"{key}={options[key]}" for key in differ if key in options)
        texts.append(f"rank {rank}: {name}({listed})")
    return "; ".join(texts)
