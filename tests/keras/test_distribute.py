"""``smp.distribute`` on one and two ranks: every kind of Keras model.

The truth is the same model undistributed, in one process, over the same microbatches:
``tests.conformance``. What needs no launch is in ``test_distributed_class``.
"""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.conformance.grid import cases_of, check_cases, write_truths
from tests.conformance.table import Row
from tests.conformance.test_scripts import check, truth
from tests.conformance.truths import Truths, TruthStore, truth_store
from tests.models import ready_made
from tests.ranks import ranks, run_ranks

CASES = {
    "kinds": ready_made.KINDS,
    "applications": ready_made.APPLICATIONS,
    "hugging_face": ready_made.HUGGING_FACE,
}
MICROBATCHES = 2
GRID = [(MICROBATCHES, "interleaved")]


def write_all(theme: str, truths: Truths) -> None:
    write_truths(cases_of(CASES, theme), [GRID], truth, truths)


def check_all(theme: str, size: int, truths: Truths, only: str = "") -> list[Row]:
    return check_cases(cases_of(CASES, theme, only), size, GRID, check, truths)


@pytest.fixture(scope="module")
def store() -> Iterator[TruthStore]:
    with truth_store() as store:
        yield store


@pytest.mark.slow
@pytest.mark.timeout(620)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("theme", list(CASES))
def test_equals_the_plain_model(theme: str, size: int, store: TruthStore) -> None:
    if theme == "hugging_face":
        pytest.importorskip("transformers")
    truths = store.of(write_all, theme, 300)
    by_rank = run_ranks(size, check_all, theme, size, truths, timeout=300)
    for rank, rows in enumerate(by_rank):
        wrong = [f"{row.model}: {row.wrong}" for row in rows if row.wrong]
        assert rows and not wrong, f"rank {rank}:\n" + "\n".join(wrong)


def loaded() -> tuple[Any, list[np.ndarray]]:
    """A functional model, and its weights, which no initializer draws."""
    model = ready_made.functional()
    return model, [weight.numpy() for weight in model.weights]


def plan(model: Any) -> None:
    """Partition it; nothing runs."""
    inputs = [tf.zeros([4, 6]), tf.zeros([4, 6])]
    smp.step(lambda left, right: model([left, right])).plan(*inputs)


def bytes_held(variable: tf.Variable) -> int:
    value = tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)
    return int(tf.size(value)) * variable.dtype.size


def check_loaded_weights() -> None:
    """Kept by their owner, freed by the other rank; whole ones for who asks."""
    model, values = loaded()
    every = list(model.weights)
    plan(smp.distribute(model))
    mine = {id(variable) for variable in model.weights}
    assert 0 < len(mine) < len(every)
    for variable, value in zip(every, values, strict=True):
        if id(variable) in mine:
            np.testing.assert_array_equal(variable, value, variable.name)
            continue
        assert bytes_held(variable) == 0, variable.name
        owner = 1 - smp.pp_rank()
        with pytest.raises(smp.SmpError, match=f"{variable.name}.*partition={owner};"):
            variable.numpy()
    for found, value in zip(model.get_weights(), values, strict=True):
        np.testing.assert_array_equal(found, value)


def check_switched_off() -> None:
    model, values = loaded()
    every = list(model.weights)
    with smp.delay_param_initialization(False):
        plan(smp.distribute(model))
    assert 0 < len(model.weights) < len(every)
    for variable, value in zip(every, values, strict=True):
        np.testing.assert_array_equal(variable, value, variable.name)


def check_training_goes_on() -> None:
    """A model that Keras has trained, with its optimizer's state, trains on."""
    random = np.random.RandomState(0)
    x, y = random.rand(8, 6).astype("f"), random.rand(8, 3).astype("f")
    found = []
    for convert in (lambda model: model, smp.distribute):
        tf.keras.utils.set_random_seed(1)
        model = tf.keras.Sequential(
            [tf.keras.Input([6]), tf.keras.layers.Dense(8), tf.keras.layers.Dense(3)]
        )
        model.compile(tf.keras.optimizers.Adam(0.1), "mse")
        model.fit(x, y, epochs=2, shuffle=False, verbose=0)
        history = convert(model).fit(x, y, epochs=2, shuffle=False, verbose=0)
        found.append([*history.history["loss"], *model.get_weights()])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


@ranks(2, timeout=100)
def test_weights_move_to_their_owners() -> None:
    smp.init({"microbatches": MICROBATCHES, "timeout_s": 60})
    check_loaded_weights()
    check_switched_off()
    check_training_goes_on()


def bert() -> Any:
    import transformers

    kind = transformers.TFBertForSequenceClassification
    options = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    settings = {**ready_made.BERT, "num_hidden_layers": 1, **options}
    return kind(transformers.BertConfig(**settings))


def fitted(convert: Any, loss: Any, labels_first: bool) -> Any:
    """(history, evaluation, logits, weights) of a model that its ``fit`` has trained.

    Args:
        labels_first: they are among the inputs in ``fit``, and beside them in
            ``evaluate``; or the other way round.
    """
    random = np.random.RandomState(0)
    ids = random.randint(3, 40, (10, 6)).astype("i4")  # the last batch has 2 rows
    x = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
    y = random.randint(0, 3, 10).astype("i4")
    among, beside = ({**x, "labels": y},), (x, y)
    first, then = (among, beside) if labels_first else (beside, among)
    tf.keras.utils.set_random_seed(1)
    model = bert()
    model(model.dummy_inputs)
    model = convert(model)
    model.compile(tf.keras.optimizers.SGD(0.1), metrics=["accuracy"], **loss)
    options = {"batch_size": 8, "verbose": 0}
    history = model.fit(*first, shuffle=False, **options).history
    evaluation = model.evaluate(*then, **options)
    logits = model.predict(x, **options).logits
    return model, (history, evaluation, logits, model.get_weights())


def check_hugging_face(folder: pathlib.Path) -> None:
    import transformers

    smp.init({"microbatches": MICROBATCHES, "timeout_s": 60})
    own = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    for loss, labels_first in (({}, False), ({"loss": own}, True)):
        _, plain = fitted(lambda model: model, loss, labels_first)
        model, found = fitted(smp.distribute, loss, labels_first)
        tf.nest.map_structure(
            lambda one, other: np.testing.assert_allclose(
                one, other, rtol=1e-4, atol=1e-5
            ),
            found,
            plain,
        )
    model.save_pretrained(folder)
    smp.barrier()
    again = transformers.TFBertForSequenceClassification.from_pretrained(folder)
    for one, other in zip(again.get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    with pytest.raises(smp.SmpError, match="saved_model=True"):
        model.save_pretrained(folder, saved_model=True)
    model.compile("sgd")
    with pytest.raises(smp.SmpError, match=r"got none.*labels=\['labels'\]"):
        model.evaluate({"input_ids": np.ones([4, 3], "i4")}, verbose=0)


@pytest.mark.timeout(220)
@pytest.mark.parametrize("size", [1, 2])
def test_hugging_face_trains_by_fit(size: int, tmp_path: pathlib.Path) -> None:
    pytest.importorskip("transformers")
    run_ranks(size, check_hugging_face, tmp_path, timeout=200)
