"""Values of a rank against those of one process, bit for bit."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

import smp_tf as smp
from smp_tf.runtime.step_output import StepOutput
from tests.models.script import every_variable

# Rewriting that changes the order of arithmetic, in the cut and the uncut graph alike.
OPTIONS = dict.fromkeys(
    ["arithmetic_optimization", "constant_folding", "remapping"], False
)


class Ownership:
    """Which variables this rank has. Those of no model are on every rank, and so are
    all of them before anything is known: in the one process of the truth."""

    def __init__(self) -> None:
        self._owner: dict[int, int] = {}

    def learn(self, models: Iterable[Any]) -> None:
        """Take over where the steps have placed the variables of ``models``."""
        for model in models:
            self._owner.update(model.placement.owner)

    def is_mine(self, variable: tf.Variable) -> bool:
        owner = self._owner.get(id(variable.handle))
        return owner is None or owner == smp.pp_rank()

    def local(self, values: Iterable[Any], variables: Iterable[tf.Variable]) -> Any:
        """Those of ``values`` that belong to a variable of this rank."""
        pairs = zip(values, variables, strict=True)
        return [value for value, variable in pairs if self.is_mine(variable)]


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """A returned tensor: its value in each microbatch."""

    values: tuple[np.ndarray, ...]


def as_numpy(value: Any) -> np.ndarray:
    return np.asarray(tf.convert_to_tensor(value).numpy())


def record(value: Any) -> Any:
    """A leaf of a result as plain data."""
    if isinstance(value, StepOutput):
        return Microbatches(tuple(map(as_numpy, value.outputs)))
    if tf.is_tensor(value) or isinstance(value, tf.Variable):
        return as_numpy(value)
    return value


def snapshot(models: Sequence[Any], state: Sequence[tf.Variable]) -> Any:
    """All variables of the models, and those around them."""
    of_models = [[as_numpy(v) for v in every_variable(model)] for model in models]
    return [*of_models, [as_numpy(v) for v in state]]


def wrong_variables(
    models: Sequence[Any], state: Sequence[tf.Variable], expected: Any, own: Ownership
) -> list[str]:
    """Names of this rank's variables that differ from a snapshot of the truth."""
    *of_models, of_state = expected
    wrong = []
    for model, values in zip(models, of_models, strict=True):
        for variable, value in zip(every_variable(model), values, strict=True):
            if own.is_mine(variable) and not is_equal(as_numpy(variable), value):
                wrong.append(f"variable {variable.name}")
    for variable, value in zip(state, of_state, strict=True):
        if not is_equal(as_numpy(variable), value):
            wrong.append(f"state {variable.name}")
    return wrong


def wrong_values(key: str, found: Any, expected: Any) -> list[str]:
    """What differs between two recorded structures, with the places."""
    found, expected = tf.nest.flatten(found), tf.nest.flatten(expected)
    wrong = []
    if len(found) != len(expected):
        wrong.append(f"{len(found)} values in {key}, not {len(expected)}")
    return wrong + [
        f"{key}[{i}] ({distance(one, other)})"
        for i, (one, other) in enumerate(zip(found, expected))
        if not is_equal(one, other)
    ]


def distance(found: Any, expected: Any) -> str:
    """For people: the largest difference, or the two values."""
    try:
        pairs = zip(found.values, expected.values, strict=True)
        return f"off by {max(np.max(np.abs(a - b)) for a, b in pairs):.2g}"
    except (AttributeError, TypeError, ValueError):
        return f"{found!r}, not {expected!r}"[:80]


def is_equal(found: Any, expected: Any) -> bool:
    """True for the same values, bit for bit."""
    if isinstance(expected, Microbatches) and isinstance(found, Microbatches):
        pairs = zip(found.values, expected.values, strict=True)
        return all(is_equal(one, other) for one, other in pairs)
    if isinstance(expected, Microbatches):  # tf.function makes Python values tensors
        return all(value == tf.constant(found).numpy() for value in expected.values)
    if isinstance(expected, np.ndarray) and isinstance(found, np.ndarray):
        return found.dtype == expected.dtype and np.array_equal(found, expected)
    return type(found) is type(expected) and found == expected
