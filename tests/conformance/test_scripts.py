"""Whole scripts on n ranks equal one process running the same microbatches.

Compared bit for bit are everything that the step returns, per microbatch, the variables
of the models and the variables around them, after each of a few steps that also apply
the gradients. Scripts that call their steps in their own ways are in ``test_jobs``.
"""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.conformance.compare import (
    Ownership,
    record,
    snapshot,
    wrong_values,
    wrong_variables,
)
from tests.conformance.grid import (
    GRIDS,
    LIMIT_SECONDS,
    REAL_GRIDS,
    Config,
    cases_of,
    check_cases,
    write_truths,
)
from tests.conformance.one_process import plain_step
from tests.conformance.table import Row, Table
from tests.conformance.truths import Truths, TruthStore
from tests.models.script import Script, ScriptCase, trainable
from tests.models.scripts import THEMES

BATCH = 8
STEPS_TRAINED = 2
LAUNCHES = ["flow+reuse+state", "differentiation+dtypes"]
REAL_LAUNCHES = ["applications", "large_applications", "hugging_face"]


def batches(case: ScriptCase) -> list[Any]:
    """The same data in different orders."""
    data = case.data(BATCH)
    orders = [
        np.random.RandomState(seed).permutation(BATCH) for seed in range(STEPS_TRAINED)
    ]
    return [
        tf.nest.map_structure(lambda t: tf.gather(t, order), data) for order in orders
    ]


class Training:
    """Trains with what a step returns; one optimizer for each list of gradients."""

    def __init__(self, script: Script, own: Ownership) -> None:
        self._script, self._own = script, own
        self._optimizers: dict[str, Any] = {}

    def apply(self, result: Any) -> None:
        for key, variables in self._script.gradients().items():
            optimizer = self._optimizers.setdefault(key, tf.keras.optimizers.SGD(0.1))
            gradients = [None if g is None else g.accumulate() for g in result[key]]
            mine = self._own.local(variables, variables)
            pairs = zip(gradients, mine, strict=True)
            optimizer.apply_gradients([(g, v) for g, v in pairs if g is not None])


def truth(case: ScriptCase, count: int) -> list[Any]:
    """(what the step returned, all variables) after each step of plain Keras."""
    tf.keras.utils.set_random_seed(1)
    script = case.build(tf.keras.Model)
    step, training = plain_step(count)(script.step), Training(script, Ownership())
    found: list[Any] = []
    for x, y in batches(case):
        result = step(x, y)
        training.apply(result)
        recorded = tf.nest.map_structure(record, result)
        found.append((recorded, snapshot(script.models, script.state)))
    return found


def differences(
    script: Script, result: Any, expected: Any, own: Ownership
) -> list[str]:
    """Names of what differs from the truth on this rank."""
    sources = script.gradients()
    wanted, variables = expected
    wrong = []
    for key, want in wanted.items():
        if key in sources:
            want = own.local(want, sources[key])
        if key == "pairs":
            want = own.local([pair[0] for pair in want], trainable(script.models[0]))
            result = {**result, key: [gradient for gradient, _ in result[key]]}
        if key == "by_name":
            mine = {v.name for model in script.models for v in model.trainable_weights}
            want = {k: v if k in mine else None for k, v in want.items()}
        found = tf.nest.map_structure(record, result[key])
        wrong += wrong_values(key, found, want)
    return wrong + wrong_variables(script.models, script.state, variables, own)


def check(case: ScriptCase, config: Config, expected: Any) -> tuple[Any, list[str]]:
    """Run one script in the current session: (a step's plan, what is wrong)."""
    if smp.rank() == 0:  # has built one more model: automatic names differ
        case.build(tf.keras.Model)
    tf.keras.utils.set_random_seed(1)
    script, own = case.build(smp.DistributedModel), Ownership()
    step, training = smp.step(script.step), Training(script, own)
    wrong: list[str] = []
    for number, (x, y) in enumerate(batches(case)):
        result = step(x, y)
        own.learn(script.models)
        training.apply(result)
        wrong += [
            f"{each} in step {number}"
            for each in differences(script, result, expected[number], own)
        ]
    return step.plan(*batches(case)[0]), wrong


def write_themes(themes: str, truths: Truths) -> None:
    grids = REAL_GRIDS if themes in REAL_LAUNCHES else GRIDS
    write_truths(cases_of(THEMES, themes), grids.values(), truth, truths)


def check_themes(
    themes: str, size: int, grid: list[tuple[int, str]], truths: Truths, only: str = ""
) -> list[Row]:
    return check_cases(cases_of(THEMES, themes, only), size, grid, check, truths)


@pytest.mark.timeout(2 * LIMIT_SECONDS + 20)
@pytest.mark.parametrize("size", list(GRIDS))
@pytest.mark.parametrize("themes", LAUNCHES)
def test_equals_one_process(
    themes: str, size: int, table: Table, store: TruthStore
) -> None:
    truths = store.of(write_themes, themes, LIMIT_SECONDS)
    table.run(size, check_themes, themes, GRIDS[size], truths, timeout=LIMIT_SECONDS)


@pytest.mark.timeout(2 * LIMIT_SECONDS + 20)
@pytest.mark.parametrize("size", list(REAL_GRIDS))
@pytest.mark.parametrize("theme", REAL_LAUNCHES)
def test_real_models_equal_one_process(
    theme: str, size: int, table: Table, store: TruthStore
) -> None:
    if theme == "hugging_face":
        pytest.importorskip("transformers")
    truths = store.of(write_themes, theme, LIMIT_SECONDS)
    grid = REAL_GRIDS[size]
    table.run(size, check_themes, theme, grid, truths, timeout=LIMIT_SECONDS)


def test_no_theme_is_left_out() -> None:
    small = {theme for themes in LAUNCHES for theme in themes.split("+")}
    assert small | set(REAL_LAUNCHES) == set(THEMES)
