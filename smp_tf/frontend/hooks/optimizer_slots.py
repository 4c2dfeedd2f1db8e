"""Where Keras optimizers keep their slots, and when they make them."""

from collections.abc import Callable, Iterator
from typing import Any

import tensorflow as tf
from tf_keras.src.optimizers import optimizer as new
from tf_keras.src.optimizers.legacy import optimizer_v2 as legacy

from smp_tf.frontend.hooks import applying, graphs

_NEW_KINDS = (new.Optimizer,)
_LEGACY_KINDS = (legacy.OptimizerV2,)


def is_optimizer(each: Any) -> bool:
    """Whether it is a Keras optimizer, new, legacy or in a LossScaleOptimizer."""
    return isinstance(each, (*_NEW_KINDS, *_LEGACY_KINDS))


def inner_of(optimizer: Any) -> Any:
    """The optimizer inside a LossScaleOptimizer; any other one itself."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def is_legacy(optimizer: Any) -> bool:
    """Whether it makes its slots bit by bit, for those variables that it updates."""
    return isinstance(inner_of(optimizer), _LEGACY_KINDS)


def children_of(optimizer: Any) -> dict[str, Any]:
    """Name -> object that a checkpoint follows. A new optimizer remembers the first
    answer, also if it had no slots then; so what it remembers is dropped."""
    inner = inner_of(optimizer)
    vars(inner).pop("_coalesced_children", None)
    found = tf.train.TrackableView.children(optimizer)
    vars(inner).pop("_coalesced_children", None)
    return dict(found)


def slots_of(optimizer: Any, variables: list[Any]) -> Iterator[tuple[str, int, Any]]:
    """Slots that exist: (slot name, index of the variable it was made for, slot).

    Args:
        variables: those that may have slots; what the optimizer keeps for others is
            left out.
    """
    optimizer = inner_of(optimizer)
    if isinstance(optimizer, _LEGACY_KINDS):
        yield from _legacy_slots(optimizer, variables)
        return
    places = dict(getattr(optimizer, "_index_dict", {}))
    for name, slots in lists_of(optimizer).items():
        for index, variable in enumerate(variables):
            place = places.get(variable._unique_id)
            if place is not None and place < len(slots):
                if isinstance(slots[place], tf.Variable):
                    yield name, index, slots[place]


def slots_of_others(optimizer: Any, variables: list[Any]) -> list[str]:
    """Names of slots that ``slots_of`` leaves out: of variables that are not these."""
    optimizer = inner_of(optimizer)
    if isinstance(optimizer, _LEGACY_KINDS):
        known = {legacy._var_key(variable) for variable in variables}
        kept = [each for key, each in optimizer._slots.items() if key not in known]
        return [slot.name for slots in kept for slot in slots.values()]
    places = dict(getattr(optimizer, "_index_dict", {}))
    for variable in variables:
        places.pop(variable._unique_id, None)
    return [
        slots[place].name
        for slots in lists_of(optimizer).values()
        for place in sorted(places.values())
        if place < len(slots) and isinstance(slots[place], tf.Variable)
    ]


def every_slot(optimizer: Any) -> Iterator[Any]:
    """All slots that exist, whatever variables they were made for."""
    optimizer = inner_of(optimizer)
    if isinstance(optimizer, _LEGACY_KINDS):
        for slots in optimizer._slots.values():
            yield from slots.values()
        return
    for slots in lists_of(optimizer).values():
        yield from slots


def lists_of(optimizer: Any) -> dict[str, Any]:
    """The attributes of a new optimizer that have a slot for each variable."""
    optimizer = inner_of(optimizer)
    if isinstance(optimizer, _LEGACY_KINDS):
        return {}
    found = children_of(optimizer)
    return {
        name: child
        for name, child in sorted(found.items())
        if name != "_variables" and isinstance(child, list)
    }


def _legacy_slots(
    optimizer: Any, variables: list[Any]
) -> Iterator[tuple[str, int, Any]]:
    slots = optimizer._slots  # get_slot raises where there is none
    for name in sorted(optimizer.get_slot_names()):
        for index, variable in enumerate(variables):
            found = slots.get(legacy._var_key(variable), {}).get(name)
            if found is not None:
                yield name, index, found


def make_scalars(optimizer: Any) -> None:
    """Let a legacy optimizer make what it would make in its first update, but for the
    slots: its counter and its hyperparameters. A new one has them."""
    optimizer = inner_of(optimizer)
    if isinstance(optimizer, _LEGACY_KINDS):
        with tf.init_scope():
            optimizer.iterations  # noqa: B018
            optimizer._create_hypers()


def after_making(optimizer: Any, function: Callable[[], bool]) -> None:
    """Call ``function`` each time the optimizer has made its slots, which it does
    before an update uses them, until it returns True."""
    optimizer = inner_of(optimizer)
    name = "_create_all_weights" if is_legacy(optimizer) else "build"
    vars(optimizer).pop(name, None)  # an earlier one, which this one replaces
    method = getattr(optimizer, name)

    @graphs.unconverted
    def make(variables: Any) -> Any:
        result = method(variables)
        with tf.init_scope():
            if function():
                vars(optimizer).pop(name, None)
        return result

    vars(optimizer)[name] = make


def missing() -> str:
    """The first place that is gone; "" if all are there."""
    for name in ("_create_all_weights", "_create_hypers"):
        if not callable(getattr(legacy.OptimizerV2, name, None)):
            return f"tf_keras OptimizerV2.{name}"
    apply = applying.plain_method(legacy.OptimizerV2.apply_gradients)
    if "_create_all_weights" not in apply.__code__.co_names:
        return "_create_all_weights in tf_keras OptimizerV2.apply_gradients"
    if not callable(getattr(legacy, "_var_key", None)):
        return "tf_keras optimizer_v2._var_key"
    if "_slots" not in legacy.OptimizerV2.__init__.__code__.co_names:
        return "tf_keras OptimizerV2._slots"
    if "build" not in new._BaseOptimizer.apply_gradients.__code__.co_names:
        return "build in tf_keras Optimizer.apply_gradients"
    if "_index_dict" not in new._BaseOptimizer._build_index_dict.__code__.co_names:
        return "tf_keras Optimizer._index_dict"
    return ""
