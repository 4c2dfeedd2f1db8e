"""Whole scripts on n ranks equal one process running the same microbatches.

For each script one table line: its stages, and what differs. Compared bit for bit are
everything that the step returns, per microbatch, the variables of the models and the
variables around them, after each of a few steps that also apply the gradients.
"""

import dataclasses
import traceback
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.runtime.step_output import StepOutput
from tests.models.script import Script, ScriptCase, every_variable, trainable
from tests.models.scripts import THEMES
from tests.ranks import run_ranks

BATCH = 8
STEPS_TRAINED = 2
# Rewriting that changes the order of arithmetic, in the cut and the uncut graph alike.
OPTIONS = dict.fromkeys(
    ["arithmetic_optimization", "constant_folding", "remapping"], False
)
GRID = [(2, "interleaved"), (4, "simple")]
LIMIT_SECONDS = 560  # of one launch; a few times what it takes


def batches(case: ScriptCase) -> list[Any]:
    """The same data in different orders."""
    data = case.data(BATCH)
    orders = [
        np.random.RandomState(seed).permutation(BATCH) for seed in range(STEPS_TRAINED)
    ]
    return [
        tf.nest.map_structure(lambda t: tf.gather(t, order), data) for order in orders
    ]


@dataclasses.dataclass(frozen=True)
class Microbatches:
    """A returned tensor: its value in each microbatch."""

    values: tuple[np.ndarray, ...]


def as_numpy(value: Any) -> np.ndarray:
    return tf.convert_to_tensor(value).numpy()


def record(value: Any) -> Any:
    """A leaf of a step's result as plain data."""
    if isinstance(value, StepOutput):
        return Microbatches(tuple(map(as_numpy, value.outputs)))
    return value


def apply(script: Script, optimizing: dict[str, Any], result: Any) -> None:
    """Train with what the step returned; one optimizer for each list of gradients."""
    for key, variables in script.gradients().items():
        optimizer = optimizing.setdefault(key, tf.keras.optimizers.SGD(0.1))
        gradients = [None if g is None else g.accumulate() for g in result[key]]
        pairs = zip(gradients, filter(is_mine, variables), strict=True)
        optimizer.apply_gradients([(g, v) for g, v in pairs if g is not None])


def is_mine(variable: tf.Variable) -> bool:
    return _owner(variable) in (None, smp.pp_rank())


_owners: dict[int, int] = {}  # of the models of the current case


def _owner(variable: tf.Variable) -> int | None:
    return _owners.get(id(variable.handle))


def snapshot(script: Script) -> list[list[np.ndarray]]:
    models = [[as_numpy(v) for v in every_variable(m)] for m in script.models]
    return [*models, [as_numpy(v) for v in script.state]]


def truth(case: ScriptCase, count: int) -> list[Any]:
    """(what the step returned, all variables) after each step of plain Keras."""
    _owners.clear()
    tf.keras.utils.set_random_seed(1)
    script = case.build(tf.keras.Model)
    step = tf.function(script.step)
    found: list[Any] = []
    optimizing: dict[str, Any] = {}
    for x, y in batches(case):
        each = []
        for i in range(count):
            part = tf.nest.map_structure(lambda t: tf.split(t, count)[i], (x, y))
            each.append(step(*part))
        result = tf.nest.map_structure(
            lambda *outputs: (
                StepOutput(outputs) if tf.is_tensor(outputs[0]) else outputs[0]
            ),
            *each,
        )
        apply(script, optimizing, result)
        found.append((tf.nest.map_structure(record, result), snapshot(script)))
    return found


def differences(script: Script, result: Any, expected: Any) -> list[str]:
    """Names of what differs from the truth on this rank."""
    sources = script.gradients()
    wanted, variables = expected
    wrong = []
    for key, want in wanted.items():
        if key in sources:
            pairs = zip(want, sources[key], strict=True)
            want = [value for value, variable in pairs if is_mine(variable)]
        if key == "pairs":
            pairs = zip(want, trainable(script.models[0]), strict=True)
            want = [pair[0] for pair, variable in pairs if is_mine(variable)]
            result = {**result, key: [gradient for gradient, _ in result[key]]}
        if key == "by_name":
            mine = {v.name for model in script.models for v in model.trainable_weights}
            want = {k: v if k in mine else None for k, v in want.items()}
        found = tf.nest.flatten(tf.nest.map_structure(record, result[key]))
        want = tf.nest.flatten(want)
        if len(found) != len(want):
            wrong.append(f"{len(found)} values in {key}, not {len(want)}")
        wrong += [
            f"{key}[{i}] ({distance(one, other)})"
            for i, (one, other) in enumerate(zip(found, want))
            if not is_equal(one, other)
        ]
    *models, state = variables
    for model, values in zip(script.models, models, strict=True):
        for variable, value in zip(every_variable(model), values, strict=True):
            if is_mine(variable) and not np.array_equal(as_numpy(variable), value):
                wrong.append(f"variable {variable.name}")
    for variable, value in zip(script.state, state, strict=True):
        if not np.array_equal(as_numpy(variable), value):
            wrong.append(f"state {variable.name}")
    return wrong


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
        return all(map(np.array_equal, found.values, expected.values))
    if isinstance(expected, Microbatches):  # tf.function makes Python values tensors
        return all(value == tf.constant(found).numpy() for value in expected.values)
    return type(found) is type(expected) and found == expected


def check(case: ScriptCase, size: int, count: int, schedule: str) -> str:
    """Run one script in one configuration; "" when it equals the truth."""
    config = {"partitions": size, "microbatches": count, "pipeline": schedule}
    smp.init({**config, "timeout_s": 30})
    expected = truth(case, count) if smp.rank() == 0 else None
    expected = smp.allgather(expected, smp.WORLD)[0]
    tf.keras.utils.set_random_seed(1)
    script = case.build(smp.DistributedModel)
    step = smp.step(script.step)
    optimizing: dict[str, Any] = {}
    wrong: list[str] = []
    for number, (x, y) in enumerate(batches(case)):
        result = step(x, y)
        for model in script.models:
            _owners.update(model.placement.owner)
        apply(script, optimizing, result)
        wrong += [
            f"{each} in step {number}"
            for each in differences(script, result, expected[number])
        ]
    stages = step.plan(*batches(case)[0]).segments.segments
    names = " ".join(f"{s.kind.value}{s.partition}" for s in stages)
    print(f"{case.name} n={size} M={count} {schedule}: {names}", end=" ")
    return "; ".join(wrong)


def check_theme(
    theme: str, size: int, grid: list[tuple[int, str]], only: str = ""
) -> dict[str, str]:
    tf.config.optimizer.set_experimental_options(OPTIONS)
    found = {}
    for case in THEMES[theme]:
        if only and case.name not in only.split(","):
            continue
        for count, schedule in grid:
            where = f"{case.name} microbatches={count} {schedule}"
            try:
                wrong = check(case, size, count, schedule)
            except Exception as error:
                wrong = f"{type(error).__name__}: {error}"[:600]
                print(case.name, "".join(traceback.format_exception(error)[-12:]))
            print(wrong or "equal", flush=True)
            if wrong:
                found[where] = wrong
            smp.shutdown()
    return found


SMALL = ("flow", "reuse", "state", "differentiation")
REAL = ("applications", "large_applications", "hugging_face")


def run_theme(theme: str, size: int, grid: list[tuple[int, str]]) -> None:
    results = run_ranks(size, check_theme, theme, size, grid, timeout=LIMIT_SECONDS)
    for rank, wrong in enumerate(results):
        assert not wrong, f"rank {rank}: {wrong}"


@pytest.mark.timeout(LIMIT_SECONDS + 20)
@pytest.mark.parametrize(("size", "grid"), [(2, GRID), (3, GRID[:1])])
@pytest.mark.parametrize("theme", SMALL)
def test_equals_one_process(
    theme: str, size: int, grid: list[tuple[int, str]]
) -> None:
    run_theme(theme, size, grid)


@pytest.mark.timeout(LIMIT_SECONDS + 20)
@pytest.mark.parametrize("theme", REAL)
def test_real_models_equal_one_process(theme: str) -> None:
    if theme == "hugging_face":
        pytest.importorskip("transformers")
    run_theme(theme, 2, GRID[:1])
