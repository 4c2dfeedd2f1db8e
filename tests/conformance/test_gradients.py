"""A step on n ranks equals one process running the same microbatches, bit for bit.

Each test launches n processes once and runs a whole grid in them: microbatches x
schedule x way of taking gradients. The truth is plain Keras in one process: one
``tf.function``, called once for each microbatch. Graph rewriting by arithmetic rules is
off: it simplifies the cut and the uncut graph differently (differences of 6e-8).
"""

import functools
import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.conformance.table import Row, Table, idle_partitions, stages_of
from tests.conformance.truths import Truths, TruthStore
from tests.models import CASES, STEPS, Case, tape_step

BATCH = 8
STEPS_TRAINED = 10
TRAINED = 4  # microbatches of the training
OPTIONS = {"arithmetic_optimization": False}
GRID = [
    *itertools.product((1, 2, 4, 8), ("interleaved", "simple"), ("tape",)),
    *itertools.product((2, 8), ("zero_bubble",), ("tape",)),
    (4, "interleaved", "legacy"),
]


def microbatches(data: Any, count: int) -> list[Any]:
    return [
        tf.nest.map_structure(lambda tensor: tf.split(tensor, count)[i], data)
        for i in range(count)
    ]


def to_numpy(value: Any) -> Any:
    return tf.nest.map_structure(lambda t: tf.convert_to_tensor(t).numpy(), value)


def truth(case: Case, count: int, style: str) -> tuple[list[Any], list[np.ndarray]]:
    """(result of each microbatch, variables afterwards) of plain Keras."""
    tf.keras.utils.set_random_seed(1)
    model = case.build(tf.keras.Model)
    xs, ys = (microbatches(part, count) for part in case.data(BATCH))
    tf.function(lambda x: model(x, training=False))(xs[0])  # builds the layers
    step = tf.function(STEPS[style](model))
    results = []
    for x, y in zip(xs, ys):
        gradients, loss, outputs = step(x, y)
        gradients = [tf.convert_to_tensor(gradient) for gradient in gradients]
        results.append(to_numpy((gradients, loss, outputs)))
    return results, to_numpy(model.variables)


def distributed(case: Case, style: str) -> tuple[Any, Any, Any]:
    """(model, its step, the step's result) for the current session."""
    if smp.rank() == 0:  # has built one more model: automatic names differ
        case.build(tf.keras.Model)
    tf.keras.utils.set_random_seed(1)
    model = case.build(smp.DistributedModel)
    step = smp.step(STEPS[style](model))
    return model, step, step(*case.data(BATCH))


def local_indices(model: Any, everything: Any, local: Any) -> list[int]:
    place = {id(variable): i for i, variable in enumerate(everything)}
    return [place[id(variable)] for variable in local]


def check_config(
    case: Case, truths: Truths, size: int, count: int, schedule: str, style: str
) -> Row:
    """Run one configuration on this rank."""
    smp.init({"partitions": size, "microbatches": count, "pipeline": schedule})
    results, variables = truths.read(count, style)
    model, step, (gradients, loss, outputs) = distributed(case, style)
    every = [v for v in model.global_variables if v.trainable]
    mine = local_indices(model, every, model.trainable_variables)
    wrong = []
    if len(gradients) != len(mine):
        wrong.append(f"{len(gradients)} gradients for {len(mine)} variables")
    for mb, (want_gradients, want_loss, want_outputs) in enumerate(results):
        if not np.array_equal(loss.outputs[mb].numpy(), want_loss):
            wrong.append(f"loss of microbatch {mb}")
        for got, want in zip(tf.nest.flatten(outputs), tf.nest.flatten(want_outputs)):
            if not np.array_equal(got.outputs[mb].numpy(), want):
                wrong.append(f"output of microbatch {mb}")
        for index, gradient in zip(mine, gradients):
            got = tf.convert_to_tensor(gradient.outputs[mb]).numpy()
            if not np.array_equal(got, want_gradients[index]):
                wrong.append(f"gradient of {every[index].name} of microbatch {mb}")
    for index, gradient in zip(mine, gradients):
        total = results[0][0][index]
        for result in results[1:]:
            total = total + result[0][index]
        mean = tf.convert_to_tensor(gradient.accumulate()).numpy()
        dense = isinstance(gradient.outputs[0], tf.Tensor)
        if not (np.array_equal if dense else np.allclose)(
            mean, total / np.float32(count)
        ):
            wrong.append(f"accumulated gradient of {every[index].name}")
    for index, variable in zip(
        local_indices(model, model.global_variables, model.variables), model.variables
    ):
        if not np.array_equal(variable.numpy(), variables[index]):
            wrong.append(f"variable {variable.name} after the step")
    plan = step.plan(*case.data(BATCH))
    wrong += filter(None, [idle_partitions(plan, size)])
    smp.shutdown()
    text = "; ".join(wrong)
    return Row(case.name, size, count, schedule, style, stages_of(plan), text)


def batches(case: Case) -> list[Any]:
    """Ten batches: the same data in ten different orders."""
    orders = [
        np.random.RandomState(seed).permutation(BATCH) for seed in range(STEPS_TRAINED)
    ]
    data = case.data(BATCH)
    return [
        tf.nest.map_structure(lambda t: tf.gather(t, order), data) for order in orders
    ]


def trained_alone(case: Case, count: int) -> list[np.ndarray]:
    """Variables of plain Keras after the steps; each adds up microbatches in order."""
    tf.keras.utils.set_random_seed(1)
    model = case.build(tf.keras.Model)
    step, optimizer = tf.function(tape_step(model)), tf.keras.optimizers.Adam(1e-2)
    tf.function(lambda x: model(x, training=False))(
        microbatches(case.data(BATCH)[0], count)[0]
    )
    for x, y in batches(case):
        total: list[Any] = []
        for part_x, part_y in zip(microbatches(x, count), microbatches(y, count)):
            gradients = list(map(tf.convert_to_tensor, step(part_x, part_y)[0]))
            total = [a + b for a, b in zip(total, gradients)] if total else gradients
        mean = [each / np.float32(count) for each in total]
        optimizer.apply_gradients(zip(mean, model.trainable_variables))
    return to_numpy(model.variables)


def check_training(case: Case, truths: Truths, size: int, count: int) -> Row:
    smp.init({"partitions": size, "microbatches": count})
    expected = truths.read("trained", count)
    tf.keras.utils.set_random_seed(1)
    model = case.build(smp.DistributedModel)
    step, optimizer = smp.step(tape_step(model)), tf.keras.optimizers.Adam(1e-2)

    @tf.function
    def train(x: Any, y: Any) -> None:
        gradients = [gradient.accumulate() for gradient in step(x, y)[0]]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))

    for x, y in batches(case):
        train(x, y)
    plan = step.plan(*case.data(BATCH))
    mine = local_indices(model, model.global_variables, model.variables)
    wrong = [
        f"{variable.name} after {STEPS_TRAINED} steps of Adam"
        for index, variable in zip(mine, model.variables)
        if not np.array_equal(variable.numpy(), expected[index])
    ]
    smp.shutdown()
    style, text = f"{STEPS_TRAINED} steps of Adam", "; ".join(wrong)
    return Row(case.name, size, count, "interleaved", style, stages_of(plan), text)


def write_grid(name: str, truths: Truths) -> None:
    tf.config.optimizer.set_experimental_options(OPTIONS)
    case = CASES[name]
    wanted: dict[Any, Callable[[], Any]] = {
        (count, style): functools.partial(truth, case, count, style)
        for count, _, style in GRID
    }
    wanted["trained", TRAINED] = functools.partial(trained_alone, case, TRAINED)
    truths.write(wanted)


def check_grid(
    name: str, size: int, grid: list[tuple[int, str, str]], truths: Truths
) -> list[Row]:
    tf.config.optimizer.set_experimental_options(OPTIONS)
    case = CASES[name]
    rows = [check_config(case, truths, size, *config).shown() for config in grid]
    return [*rows, check_training(case, truths, size, TRAINED).shown()]


@pytest.mark.timeout(820)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("name", list(CASES))
def test_equals_one_process(
    name: str, size: int, table: Table, store: TruthStore
) -> None:
    truths = store.of(write_grid, name, 400)
    table.run(size, check_grid, name, GRID, truths, timeout=400)
