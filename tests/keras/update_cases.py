"""Optimizers, and gradients for them: whole, and divided among ranks.

The truth is the same optimizer over all variables, in the same process; each rank
compares what it owns. Gradients are given, so that only the update is tested.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

new = tf.keras.optimizers
legacy = tf.keras.optimizers.legacy
Make = Callable[[], Any]

SHAPES = ([4, 3], [3], [6, 2], [5], [2])
SPARSE, WITHOUT = 2, 4  # an embedding; a variable that has no gradient
STEPS = 5


class Doubled(new.Optimizer):
    """A user's own: no more than Keras asks for."""

    def __init__(self, learning_rate: Any = 0.1, **kwargs: Any) -> None:
        super().__init__(name="Doubled", **kwargs)
        self._learning_rate = self._build_learning_rate(learning_rate)

    def build(self, var_list: Any) -> None:
        super().build(var_list)
        if not hasattr(self, "seen"):
            self.seen = [self.add_variable_from_reference(v, "seen") for v in var_list]
            self._built = True

    def update_step(self, gradient: Any, variable: Any) -> None:
        seen = self.seen[self._index_dict[self._var_key(variable)]]
        seen.assign_add(tf.convert_to_tensor(gradient))
        variable.assign_sub(2.0 * self.learning_rate * seen)


class Strict(legacy.SGD):
    """Takes no empty list, as that of the transformers library."""

    def apply_gradients(self, grads_and_vars: Any, *args: Any, **kwargs: Any) -> Any:
        gradients, variables = zip(*grads_and_vars)
        return super().apply_gradients(zip(gradients, variables), *args, **kwargs)


def decay() -> Any:
    return new.schedules.ExponentialDecay(0.1, 2, 0.5)


def excluding(optimizer: Any) -> Any:
    optimizer.exclude_from_weight_decay(var_names=["v1"])
    return optimizer


EXACT: dict[str, Make] = {
    "SGD": lambda: new.SGD(0.1),
    "momentum": lambda: new.SGD(decay(), momentum=0.9, nesterov=True),
    "RMSprop": lambda: new.RMSprop(0.01, momentum=0.9, centered=True),
    "Adam": lambda: new.Adam(decay(), amsgrad=True),
    "AdamW": lambda: excluding(new.AdamW(0.01, weight_decay=0.1)),
    "Adagrad": lambda: new.Adagrad(0.01),
    "Adadelta": lambda: new.Adadelta(0.1),
    "Adamax": lambda: new.Adamax(0.01),
    "Nadam": lambda: new.Nadam(0.01),
    "Ftrl": lambda: new.Ftrl(0.01),
    "Lion": lambda: new.Lion(0.01, weight_decay=0.1),
    "EMA": lambda: new.Adam(0.01, use_ema=True, ema_overwrite_frequency=2),
    "EMA at the end": lambda: new.SGD(0.1, use_ema=True, ema_momentum=0.5),
    "clipnorm": lambda: new.SGD(0.1, clipnorm=0.5),
    "clipvalue": lambda: new.SGD(0.1, clipvalue=0.3),
    "one's own": lambda: Doubled(decay()),
    "legacy SGD": lambda: legacy.SGD(0.1, momentum=0.9, nesterov=True, decay=0.1),
    "legacy RMSprop": lambda: legacy.RMSprop(decay()),
    "legacy Adam": lambda: legacy.Adam(0.01, amsgrad=True, clipvalue=0.3),
    "legacy Adagrad": lambda: legacy.Adagrad(0.01),
    "legacy Adadelta": lambda: legacy.Adadelta(0.1),
    "legacy Adamax": lambda: legacy.Adamax(0.01),
    "legacy Nadam": lambda: legacy.Nadam(0.01),
    "legacy Ftrl": lambda: legacy.Ftrl(0.01),
    "legacy clipnorm": lambda: legacy.SGD(0.1, clipnorm=0.5),
    "legacy strict": lambda: Strict(decay()),
}
DENSE: dict[str, Make] = {"Adafactor": lambda: new.Adafactor(0.01)}  # fails on slices
SOME = ("momentum", "Nadam", "EMA", "one's own", "legacy Nadam", "legacy strict")
BY_GLOBAL_NORM: dict[str, Make] = {
    # A new optimizer leaves out clipvalue here, a legacy one does not.
    "global": lambda: new.SGD(decay(), global_clipnorm=0.5, clipvalue=0.01),
    "global, above": lambda: new.AdamW(0.1, global_clipnorm=1e6),
    "legacy global": lambda: legacy.SGD(0.1, global_clipnorm=0.5, clipvalue=0.3),
    "legacy schedule": lambda: legacy.SGD(decay(), momentum=0.9, global_clipnorm=0.4),
}
# The norm rounds otherwise when it is added up over ranks, by a unit of float32 or two,
# and with it each gradient: 1e-6 of an update, and an update is not above 0.1.
CLOSE = {"rtol": 1e-6, "atol": 1e-7}
SAME = {"rtol": 0.0, "atol": 0.0}


def value(seed: int, shape: Sequence[int]) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype("float32")


def gradients_at(
    step: int, dense: bool, scale: float = 1.0, replica: int = 0
) -> list[Any]:
    """For all variables."""
    seed = 100 * step + 10_000 * replica
    found: list[Any] = [
        tf.constant(value(seed + i, shape) * scale) for i, shape in enumerate(SHAPES)
    ]
    if not dense:
        # Other rows, and another number of them, on each replica.
        places = tf.constant([1, 4, 1, 5][: 3 + replica % 2])
        rows = tf.constant(value(seed + 50, [len(places), 2]) * scale)
        shape = tf.constant(SHAPES[SPARSE])
        found[SPARSE] = tf.IndexedSlices(rows, places, shape)
    found[WITHOUT] = None
    return found


def mean_of(every: Sequence[Sequence[Any]]) -> list[Any]:
    """The means of the replicas' gradients; rows of slices one after the other."""

    def mean(gradients: Sequence[Any]) -> Any:
        first, count = gradients[0], len(gradients)
        if first is None:
            return None
        if isinstance(first, tf.IndexedSlices):
            values = tf.concat([each.values for each in gradients], 0)
            indices = tf.concat([each.indices for each in gradients], 0)
            return tf.IndexedSlices(values / count, indices, first.dense_shape)
        return sum(gradients[1:], first) / count

    return [mean(gradients) for gradients in zip(*every)]


class Run:
    """An optimizer over some of the variables."""

    def __init__(self, make: Make, places: Sequence[int], apply: Any) -> None:
        self.places, self.optimizer, self.apply = places, make(), apply
        list(_variables_of(self.optimizer))  # may be read before the first step
        self.every = [
            tf.Variable(value(i, shape), name=f"v{i}")
            for i, shape in enumerate(SHAPES)
        ]
        self.variables = [self.every[i] for i in places]

    def step(self, gradients: Sequence[Any]) -> None:
        mine = [gradients[i] for i in self.places]
        self.apply(self.optimizer, mine, self.variables, self.every)

    def finish(self) -> None:
        if hasattr(self.optimizer, "finalize_variable_values"):
            self.optimizer.finalize_variable_values(self.variables)


def plainly(optimizer: Any, gradients: Any, variables: Any, every: Any = ()) -> None:
    optimizer.apply_gradients(list(zip(gradients, variables)))


def unscaled(optimizer: Any, gradients: Any, variables: Any, every: Any = ()) -> None:
    plainly(optimizer, optimizer.get_unscaled_gradients(gradients), variables)


def _variables_of(optimizer: Any) -> Sequence[Any]:
    found = optimizer.variables
    return found() if callable(found) else found


def compare(name: str, mine: Run, whole: Run, close: Mapping[str, float]) -> None:
    for place, variable in zip(mine.places, mine.variables):
        np.testing.assert_allclose(
            variable, whole.variables[place], **close, err_msg=f"{name}: v{place}"
        )
    assert int(mine.optimizer.iterations) == int(whole.optimizer.iterations), name
    rates = [run.optimizer.learning_rate for run in (mine, whole)]
    if not callable(rates[0]):
        np.testing.assert_array_equal(*map(float, rates), err_msg=name)
    local = sum(np.prod(SHAPES[place]) for place in mine.places)
    kept = sum(np.prod(v.shape) for v in _variables_of(mine.optimizer))
    # Up to three slots, a few scalars, and Nadam's for variables of other ranks.
    most = 4 * local + 5 + 3 * len(SHAPES)
    assert kept <= most, f"{name}: slots of other ranks' variables"


def check(
    apply: Any,
    cases: Mapping[str, Make],
    places: Sequence[int],
    close: Mapping[str, float],
    dense: bool = False,
    replica: int = 0,
    replicas: int = 1,
    wrap: Any = lambda make: make,
) -> list[str]:
    """Names of the cases that differ, with the reason.

    Args:
        places: of the variables that this rank has.
        wrap: makes what is tested of a case.
    """
    runs = {
        name: (Run(wrap(make), places, apply), Run(make, range(len(SHAPES)), plainly))
        for name, make in cases.items()
    }

    @tf.function
    def steps(gradients: Any, means: Any) -> None:
        for mine, whole in runs.values():
            mine.step(gradients)
            whole.step(means)

    for number in range(STEPS):
        every = [gradients_at(number, dense, 1.0, each) for each in range(replicas)]
        steps(every[replica], mean_of(every))
    wrong = []
    for name, (mine, whole) in runs.items():
        mine.finish()
        whole.finish()
        try:
            compare(name, mine, whole, close)
        except AssertionError as error:
            wrong.append(str(error))
    return wrong


def scaled(inner: Make, **options: Any) -> Make:
    return lambda: tf.keras.mixed_precision.LossScaleOptimizer(inner(), **options)


GROWING = {"initial_scale": 8.0, "dynamic_growth_steps": 2}
FIXED = {"initial_scale": 8.0, "dynamic": False}
SCALED: dict[str, tuple[Make, Mapping[str, float]]] = {
    "new": (scaled(lambda: new.Adam(decay()), **GROWING), SAME),
    "global": (scaled(lambda: new.SGD(0.1, global_clipnorm=0.5), **GROWING), CLOSE),
    "legacy": (scaled(lambda: legacy.SGD(decay(), momentum=0.9), **GROWING), SAME),
    "legacy global": (
        scaled(lambda: legacy.SGD(0.1, global_clipnorm=0.5, clipvalue=0.3), **GROWING),
        CLOSE,
    ),
    "fixed": (scaled(lambda: new.SGD(0.1), **FIXED), SAME),
    "legacy fixed": (scaled(lambda: legacy.Adam(0.1), **FIXED), SAME),
}


def plain(step: int, scale: float) -> list[Any]:
    """Scaled gradients."""
    return gradients_at(step, dense=False, scale=scale)


def spoiled(step: int, scale: float) -> list[Any]:
    """Scaled gradients; one of them overflows in some steps."""
    gradients = plain(step, scale)
    if step == 3:
        gradients[0] = gradients[0] * np.inf
    if step == 4:  # of the embedding, which has few rows
        rows = gradients[SPARSE]
        values = rows.values * np.float32([[1.0], [np.nan], [1.0]])
        gradients[SPARSE] = tf.IndexedSlices(values, rows.indices, rows.dense_shape)
    return gradients
