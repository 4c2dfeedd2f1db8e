"""Segments that XLA compiles give what they give without it, within rounding.

Those that it cannot compile run as they are: never an error, one line in the log.
"""

import logging
import os
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.plan import piece
from tests.models import CASES, STEPS
from tests.models.script import cross_entropy, subclass
from tests.ranks import run_ranks
from tests.unit.one_process import session

layers = tf.keras.layers

TOLERANCE = 1e-5
"""Of the largest value of a tensor; see README. Values below 0.1 count as 0.1: the bias
of a convolution before a BatchNormalization has no gradient but rounding errors."""

M = 4
BATCH = 8
STEPS_TRAINED = 2


def assert_close(got: Any, want: Any) -> None:
    for one, other in zip(tf.nest.flatten(got), tf.nest.flatten(want), strict=True):
        scale = max(np.abs(other).max(), 0.1)
        np.testing.assert_allclose(one, other, rtol=0, atol=TOLERANCE * scale)


def said(caplog: Any) -> list[str]:
    """What the log says of XLA; of the last step that was built."""
    lines = [record.getMessage() for record in caplog.records]
    lines = [line for line in lines if line.startswith("xla: ")]
    caplog.clear()
    return lines


# --- models of the gradient tests, on 1 and 2 ranks -----------------------------------


def train(name: str) -> dict[str, Any]:
    """A few steps in the current session: all that they give on this rank."""
    case = CASES[name]
    tf.keras.utils.set_random_seed(1)
    model = case.build(smp.DistributedModel)
    step = smp.step(STEPS["tape"](model))
    optimizer = tf.keras.optimizers.SGD(0.1)
    found: dict[str, Any] = {}
    for number in range(STEPS_TRAINED):
        gradients, loss, outputs = step(*case.data(BATCH))
        mine = model.trainable_variables
        means = [tf.convert_to_tensor(each.accumulate()) for each in gradients]
        optimizer.apply_gradients(zip(means, mine, strict=True))
        found[f"loss {number}"] = loss.stack().numpy()
        for i, output in enumerate(tf.nest.flatten(outputs)):
            found[f"output {i} {number}"] = output.merge().numpy()
    place = {id(each): i for i, each in enumerate(model.global_variables)}
    for variable in model.variables:
        found[f"variable {place[id(variable)]}"] = variable.numpy()
    return found


class Lines(logging.Handler):
    """What the log says of XLA."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        if record.getMessage().startswith("xla: "):
            self.lines.append(record.getMessage())


def train_on_a_rank(names: list[str], folder: str) -> tuple[Any, list[str], list[str]]:
    """(results of two runs with XLA, log, names of what XLA has compiled)."""
    dump = pathlib.Path(folder, os.environ["HOROVOD_RANK"])
    os.environ["XLA_FLAGS"] = f"--xla_dump_to={dump}"
    lines = Lines()
    logging.getLogger("smp_tf").addHandler(lines)
    logging.getLogger("smp_tf").setLevel(logging.INFO)
    found = []
    for _ in range(2):
        smp.init({"partitions": smp_size(), "microbatches": M, "xla": True})
        found.append({name: train(name) for name in names})
        smp.shutdown()
    files = [path.name for path in dump.glob("*before_optimizations.txt")]
    compiled = [re.search(r"stage_\d+_[A-Z]_\d+", name) for name in files]
    return found, lines.lines, [match[0] for match in compiled if match]


def smp_size() -> int:
    return int(os.environ["HOROVOD_SIZE"])


def test_on_two_ranks(tmp_path: Any) -> None:
    names = ["mlp", "conv"]
    with session(microbatches=M, xla=True):
        alone = {name: train(name) for name in names}
    ranks = run_ranks(2, train_on_a_rank, names, str(tmp_path), timeout=100)
    for name in names:
        merged: dict[str, Any] = {}
        for (first, second), _, _ in ranks:
            for key, value in first[name].items():
                assert np.array_equal(value, second[name][key]), key
            merged.update(first[name])
        assert sorted(merged) == sorted(alone[name])
        assert_close([merged[key] for key in alone[name]], list(alone[name].values()))
    for _, lines, compiled in ranks:
        assert all("2 of 2 segments compiled" in line for line in lines), lines
        assert len(lines) == 2 * len(names)
        # Each once for all microbatches and steps; a backward may be in two pieces.
        assert len(set(compiled)) == len(compiled) >= 2 * len(lines)


@pytest.mark.parametrize("name", list(CASES))
def test_equals_without_xla(name: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "smp_tf")
    with session(microbatches=M):
        want = train(name)
    assert said(caplog) == []
    with session(microbatches=M, xla=True):
        got = train(name)
    (line,) = said(caplog)
    assert "2 of 2 segments compiled" in line
    assert_close(list(got.values()), list(want.values()))


# --- what models do inside of ``call`` ------------------------------------------------


def _py_function(x: tf.Tensor) -> tf.Tensor:
    doubled = tf.numpy_function(lambda a: a * 2, [tf.stop_gradient(x)], tf.float32)
    return x + tf.ensure_shape(doubled, x.shape)


def _strings(x: tf.Tensor) -> tf.Tensor:
    lengths = tf.strings.length(tf.as_string(x))
    return x + tf.cast(lengths, x.dtype)


def _printing(x: tf.Tensor) -> tf.Tensor:
    tf.print("a line", tf.reduce_sum(x), output_stream="file:///dev/null")
    return x * 2.0


def _asserting(x: tf.Tensor) -> tf.Tensor:
    check = tf.debugging.assert_less(tf.reduce_sum(x), 1e9)
    with tf.control_dependencies([check] if check is not None else []):
        return tf.identity(x)


def _endless_with_zeros(x: tf.Tensor) -> tf.Tensor:
    grown = tf.while_loop(
        lambda y: tf.reduce_sum(tf.abs(y)) < 100.0, lambda y: [y * 2.0], [x]
    )
    return x + tf.stop_gradient(grown[0])


def _branches(x: tf.Tensor) -> tf.Tensor:
    return tf.cond(tf.reduce_sum(x) > 0, lambda: tf.tanh(x), lambda: tf.exp(x))


def _random_branches(x: tf.Tensor) -> tf.Tensor:
    numbers = tf.cond(
        tf.reduce_sum(tf.stop_gradient(x)) > 0,
        lambda: tf.random.uniform([8], seed=1),
        lambda: tf.random.normal([8], seed=2),
    )
    return x * numbers


def _sampled(x: tf.Tensor) -> tf.Tensor:
    return x * tf.cast(tf.random.categorical(tf.tanh(x), 8, seed=3), tf.float32)


def _stateless(x: tf.Tensor) -> tf.Tensor:
    return tf.nn.experimental.stateless_dropout(x, 0.5, [1, 2])


def _dropout(x: tf.Tensor) -> tf.Tensor:
    return tf.nn.dropout(x, 0.5, seed=4) * tf.random.normal(tf.shape(x), seed=5)


def _recomputed(x: tf.Tensor) -> tf.Tensor:
    again = tf.recompute_grad(lambda y: tf.tanh(_stateless(y)))
    return tf.cast(again(x), tf.float32)


def _shapes(x: tf.Tensor) -> tf.Tensor:
    rows = tf.shape(x)[0]
    return tf.reshape(tf.transpose(tf.reshape(x, [rows, 2, 4]), [0, 2, 1]), [rows, 8])


def _unknown_shape(x: tf.Tensor) -> tf.Tensor:
    return x + tf.reduce_sum(tf.boolean_mask(x, x > 0.0))


INSIDE: list[tuple[Callable[..., Any], str]] = [
    (_py_function, "PyFunc"),
    (_strings, "AsString"),
    (_printing, "StringFormat"),
    (_asserting, ""),
    (_endless_with_zeros, ""),
    (_branches, "holds variant"),
    (_random_branches, "draws random numbers"),
    (_sampled, "computes from what random numbers are drawn"),
    (_stateless, ""),
    (_dropout, ""),
    (_recomputed, ""),
    (_shapes, ""),
    (_unknown_shape, "has no static shape"),
    (layers.LSTM(8), "holds variant"),
    (layers.BatchNormalization(), ""),
]
NAMES = [getattr(inside, "__name__", type(inside).__name__) for inside, _ in INSIDE]


def run_inside(inside: Any, **config: Any) -> Any:
    """Two steps of a model with a middle part; what they give."""
    if isinstance(inside, layers.Layer):
        inside = type(inside).from_config(inside.get_config())

    def init(model: Any) -> None:
        model.embed = layers.Embedding(20, 8)
        model.inside, model.head = inside, layers.Dense(6)

    def call(model: Any, ids: tf.Tensor, training: bool | None) -> tf.Tensor:
        x = model.embed(ids)
        if isinstance(inside, layers.LSTM):
            return model.head(model.inside(x))
        return model.head(model.inside(x[:, 0] + x[:, 1]))

    tf.keras.utils.set_random_seed(1)
    with session(microbatches=2, **config):
        model = subclass(smp.DistributedModel, init, call)

        @smp.step
        def step(ids: Any, labels: Any) -> Any:
            with tf.GradientTape() as tape:
                logits = model(ids, training=True)
                loss = cross_entropy(labels, logits)
            return tape.gradient(loss, model.trainable_variables), logits

        ids = tf.constant(np.random.RandomState(0).randint(0, 20, (BATCH, 2)))
        found: list[Any] = []
        for _ in range(2):
            gradients, logits = step(ids, tf.range(BATCH) % 6)
            found += [tf.convert_to_tensor(each.accumulate()) for each in gradients]
            found += logits.outputs
        return [each.numpy() for each in [*found, *model.variables]]


@pytest.mark.parametrize(("inside", "reason"), INSIDE, ids=NAMES)
def test_compiles_or_falls_back(inside: Any, reason: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "smp_tf")
    want = run_inside(inside)
    assert said(caplog) == []
    got = run_inside(inside, xla=True)
    *fallbacks, last = said(caplog)
    assert_close(got, want)
    if not reason:
        assert fallbacks == [] and "2 of 2 segments compiled" in last
        return
    stages = [line.split("stage=")[1].split()[0] for line in fallbacks]
    assert stages == sorted(set(stages)) and stages[0] == "0"
    where = "stage=0 kind=F partition=0 runs without XLA: "
    assert re.search(f"{where}.*{reason}", fallbacks[0])
    assert f"{2 - len(stages)} of 2 segments compiled" in last


# --- ways of building a step ----------------------------------------------------------


def test_building_changes_no_variable() -> None:
    with session(microbatches=2, xla=True):
        model = CASES["conv"].build(smp.DistributedModel)
        step = smp.step(STEPS["tape"](model))
        step.plan(*CASES["conv"].data(BATCH))
        averages = [each for each in model.variables if "moving" in each.name]
        assert len(averages) == 4
        for average in averages:
            expected = 0.0 if "mean" in average.name else 1.0
            assert np.array_equal(average, np.full(average.shape, expected))


@pytest.fixture
def jit() -> Iterator[None]:
    tf.config.optimizer.set_jit(True)
    try:
        yield
    finally:
        tf.config.optimizer.set_jit(False)


def test_set_jit_is_xla(jit: None, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "smp_tf")
    with session(microbatches=M):
        got = train("mlp")
    assert "2 of 2 segments compiled" in said(caplog)[-1]
    with session(microbatches=M, xla=True):
        assert_close(list(train("mlp").values()), list(got.values()))


def test_unknown_sizes_run_without(caplog: Any) -> None:
    caplog.set_level(logging.INFO, "smp_tf")
    with session(microbatches=2, xla=True):
        model = CASES["mlp"].build(smp.DistributedModel)
        step = smp.step(lambda x: model(x))

        @tf.function(input_signature=[tf.TensorSpec([None, 32])])
        def outer(x: Any) -> Any:
            return step(x).merge()

        x = tf.constant(np.random.RandomState(0).rand(BATCH, 32).astype("f"))
        results = [outer(x[:count]).numpy() for count in (2, 8)]
        assert_close(results[0], results[1][[0, 1]])
    first, last = said(caplog)
    assert "tensor 0 of the step's arguments has no static shape: (None, 32)" in first
    assert "0 of 1 segments compiled" in last


def test_a_segment_in_pieces(monkeypatch: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "smp_tf")
    monkeypatch.setattr(piece, "PIECE_BYTES", 1000)
    with session(microbatches=M):
        want = train("mlp")
    with session(microbatches=M, xla=True):
        got = train("mlp")
    assert_close(list(got.values()), list(want.values()))
    assert "2 of 2 segments compiled" in said(caplog)[-1]


# --- fit, in every dtype policy -------------------------------------------------------


def fitted(policy: str, xla: bool) -> tuple[list[float], list[Any]]:
    """Losses and weights of a short training with a remainder, in one process."""
    tf.keras.mixed_precision.set_global_policy(policy)
    tf.keras.utils.set_random_seed(1)
    try:
        with session(microbatches=M, xla=xla):
            model = smp.distribute(
                tf.keras.Sequential(
                    [
                        tf.keras.Input([8, 8, 2]),
                        layers.Conv2D(4, 3),
                        layers.BatchNormalization(),
                        layers.ReLU(),
                        layers.Flatten(),
                        layers.Dropout(0.2, seed=1),
                        layers.Dense(3, dtype="float32"),
                    ]
                )
            )
            loss = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
            optimizer = tf.keras.optimizers.SGD(0.05, momentum=0.9)
            if policy == "mixed_float16":
                # Far below where a gradient overflows: on some processors one does
                # without XLA, which rounds less often, and a step is left out.
                optimizer = tf.keras.mixed_precision.LossScaleOptimizer(
                    optimizer, initial_scale=1024.0
                )
            model.compile(optimizer, loss)
            x = np.random.RandomState(0).rand(18, 8, 8, 2).astype("f")
            y = np.arange(18) % 3
            history = model.fit(
                x, y, batch_size=8, epochs=2, shuffle=False, verbose=0
            ).history
            return history["loss"], model.get_weights()
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")


POLICIES = {"float32": 1e-5, "mixed_float16": 1e-2, "mixed_bfloat16": 5e-2}
"""Of the largest value of a tensor, as TOLERANCE; see README."""


@pytest.mark.parametrize("policy", POLICIES)
def test_fit_in_every_policy(policy: str, caplog: Any) -> None:
    caplog.set_level(logging.INFO, "smp_tf")
    losses, weights = fitted(policy, xla=False)
    assert said(caplog) == []
    got_losses, got_weights = fitted(policy, xla=True)
    assert any("2 of 2 segments compiled" in line for line in said(caplog))
    worst = 0.0
    pairs = zip([got_losses, *got_weights], [losses, *weights], strict=True)
    for one, other in pairs:
        scale = max(np.abs(other).max(), 0.1)
        worst = max(worst, np.abs(np.subtract(one, other)).max() / scale)
    print(f"{policy}: {worst:.1e}")
    assert worst <= POLICIES[policy]
    if policy != "float32":
        assert worst > 0.0  # both ran in so few digits
