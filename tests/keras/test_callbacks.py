"""Callbacks in ``fit``, against plain Keras with the same callbacks in one process.

All files, their contents, the decisions and the history must be those of plain Keras;
and rank 0 alone writes and prints.
"""

import importlib
import pathlib
import re
import site
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.keras.callback_cases import (
    CONFIG,
    FLOATS,
    START,
    arrays,
    cases,
    fit,
    keras,
    network,
    rows_of,
    weights_of,
)
from tests.ranks import ROOT, run_ranks, start_ranks

# --- run by both, with smp.DistributedModel or plain Keras as the base


def decisions(base: type, folder: str) -> dict[str, Any]:
    """Those that decide, from the validation's loss, and what each of them prints."""
    model = network(base)
    stop = keras.callbacks.EarlyStopping(
        patience=3, min_delta=0.02, restore_best_weights=True, verbose=1
    )
    reduce = keras.callbacks.ReduceLROnPlateau(patience=1, min_delta=0.05, verbose=1)
    rates: list[float] = []
    seen = keras.callbacks.LambdaCallback(
        on_epoch_end=lambda epoch, logs: rates.append(
            float(model.optimizer.learning_rate.numpy())
        )
    )
    schedule = keras.callbacks.LearningRateScheduler(
        lambda epoch, rate: rate * (2.0 if epoch == 1 else 0.9), verbose=1
    )
    history = fit(model, [stop, reduce, schedule, seen], epochs=20)
    return {
        "history": history.history,
        "stopped": stop.stopped_epoch,
        "best": stop.best,
        "rates": rates,
        "weights": weights_of(model),
    }


def files(base: type, folder: str) -> dict[str, Any]:
    """Those that write: what they print, and the figures that they keep."""
    model = network(base)
    best = keras.callbacks.ModelCheckpoint(
        f"{folder}/best/model.weights.h5",
        save_best_only=True,
        save_weights_only=True,
        verbose=1,
    )
    callbacks = [
        keras.callbacks.CSVLogger(f"{folder}/log.csv"),
        keras.callbacks.ModelCheckpoint(
            folder + "/each/{epoch:02d}-{val_accuracy:.2f}", save_weights_only=True
        ),
        keras.callbacks.ModelCheckpoint(
            folder + "/often/{epoch}-{batch}", save_weights_only=True, save_freq=5
        ),
        best,
        keras.callbacks.RemoteMonitor("http://127.0.0.1:9"),  # nobody listens
        keras.callbacks.ProgbarLogger("steps"),
    ]
    fit(model, callbacks, epochs=4, verbose=2)
    kept = best.best
    fit(model, [keras.callbacks.CSVLogger(f"{folder}/log.csv", append=True)], epochs=1)
    return {"best": kept, "weights": weights_of(model)}


def not_a_number(base: type, folder: str) -> dict[str, Any]:
    """TerminateOnNaN, after a batch, whose logs another callback has changed."""

    def spoil(batch: int, logs: Any) -> None:
        if batch == 1:
            logs["loss"] = float("nan")

    spoils = keras.callbacks.LambdaCallback(on_train_batch_end=spoil)
    model = network(base)
    batches: list[int] = []
    count = keras.callbacks.LambdaCallback(
        on_train_batch_begin=lambda batch, logs: batches.append(batch)
    )
    fit(model, [spoils, keras.callbacks.TerminateOnNaN(), count])
    return {"batches": batches}


def board(base: type, folder: str) -> dict[str, Any]:
    """TensorBoard with all that it can do; nothing without its package."""
    try:
        importlib.import_module("tensorboard")
    except ImportError:
        return {}
    tf.io.gfile.makedirs(f"{folder}/board")
    callback = keras.callbacks.TensorBoard(
        f"{folder}/board",
        histogram_freq=2,
        write_images=True,
        update_freq="batch",
        embeddings_freq=2,
        profile_batch=(2, 3),
    )
    fit(network(base), [callback], epochs=3)
    return {}


STOCK = {each.__name__: each for each in (decisions, files, not_a_number, board)}


def run_stock(folder: str) -> dict[str, Any]:
    found = {}
    for name, run in STOCK.items():
        print(f"{START}{name}", flush=True)
        smp.init(CONFIG)
        found[name] = run(smp.DistributedModel, f"{folder}/{name}")
        smp.shutdown()
    print(f"{START}end", flush=True)
    return found


class Launched:
    """What the ranks have returned and printed, and what plain Keras has."""

    def __init__(self, folder: pathlib.Path, size: int) -> None:
        self.here, self.there = folder / "plain", folder / f"ranks{size}"
        for name in STOCK:
            (self.there / name).mkdir(parents=True)
            (self.here / name).mkdir(parents=True, exist_ok=True)
        outcomes = start_ranks(
            size, run_stock, str(self.there), timeout=200, env=_environment()
        )
        failed = [str(each) for each in outcomes if each.exit_code]
        assert not failed, "\n".join(failed)
        self.values = [each.value for each in outcomes]
        self.printed = [cases(each) for each in outcomes]


def _environment() -> dict[str, str]:
    """With it the ranks find what is installed for this process."""
    try:
        found = importlib.import_module("tensorboard").__file__
    except ImportError:
        return {}
    place = str(pathlib.Path(str(found)).parents[1])
    installed = place in site.getsitepackages()
    return {} if installed else {"PYTHONPATH": f"{ROOT}:{place}"}


@pytest.fixture(scope="module", params=[2, 3])
def launched(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Launched:
    return Launched(tmp_path_factory.mktemp("callbacks"), request.param)


@pytest.fixture(scope="module")
def plain(launched: Launched) -> Iterator[dict[str, Any]]:
    yield {
        name: run(keras.Model, str(launched.here / name)) for name, run in STOCK.items()
    }


def assert_close(found: Any, expected: Any) -> None:
    tf.nest.map_structure(
        lambda a, b: np.testing.assert_allclose(a, b, FLOATS, FLOATS), found, expected
    )


@pytest.mark.timeout(400)
def test_decisions_are_those_of_plain_keras(
    launched: Launched, plain: dict[str, Any]
) -> None:
    for value in launched.values:
        assert_close(value["decisions"], plain["decisions"])
        assert value["not_a_number"] == plain["not_a_number"] == {"batches": [0, 1]}
        np.testing.assert_equal(value["decisions"], launched.values[0]["decisions"])
    assert 0 < plain["decisions"]["stopped"] < 19
    assert len(set(plain["decisions"]["rates"])) > 3


def files_of(folder: pathlib.Path) -> set[str]:
    every = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)) for path in every}


def test_files_are_those_of_plain_keras(
    launched: Launched, plain: dict[str, Any]
) -> None:
    there, here = launched.there / "files", launched.here / "files"
    assert files_of(there) == files_of(here)
    header, rows = rows_of(there / "log.csv")
    expected_header, expected = rows_of(here / "log.csv")
    assert header == expected_header and len(rows) == 4 + 1
    assert_close(rows, expected)
    for value in launched.values:
        assert_close(value["files"], plain["files"])
    model, other = network(keras.Model), network(keras.Model)
    for each in (model, other):
        each.predict(arrays()[0][:1], verbose=0)
    prefixes = {re.sub(r"\.(index|data-.*)$", "", name) for name in files_of(there)}
    checked = [n for n in sorted(prefixes) if not n.endswith(("csv", "checkpoint"))]
    assert len(checked) == 4 + 2 + 1  # each epoch, batches 5 and 10, the best
    for name in checked:
        model.load_weights(there / name)
        other.load_weights(here / name)
        assert_close(weights_of(model), weights_of(other))


def test_all_is_printed_once(launched: Launched) -> None:
    for other in launched.printed[1:]:
        for name in STOCK:
            # TensorFlow tells of its libraries when it starts.
            assert not other[name].strip(), name
    told = launched.printed[0]
    for text, count in (
        ("LearningRateScheduler setting learning rate", None),
        ("ReduceLROnPlateau reducing", None),
        (": early stopping", 1),
        ("Restoring model weights", 1),
    ):
        found = told["decisions"].count(text)
        assert found == count if count else found > 1, text
    assert told["files"].count("val_loss improved") >= 1
    assert told["files"].count("3/3 - ") == 4  # one bar, of four epochs
    assert told["files"].count("could not reach RemoteMonitor") >= 4
    assert told["not_a_number"].count("Invalid loss, terminating") == 1


def events_of(folder: pathlib.Path) -> dict[str, list[Any]]:
    """Tag of a summary -> (step, figures) in the order in which they were written."""
    found: dict[str, list[Any]] = {}
    for path in sorted(folder.rglob("events.out.tfevents.*.v2")):
        for event in tf.compat.v1.train.summary_iterator(str(path)):
            if event.graph_def:
                found.setdefault(f"{path.parent.name} graph", []).append(event.step)
            for value in event.summary.value:
                tag = f"{path.parent.name} {value.tag}"
                array = tf.make_ndarray(value.tensor)
                found.setdefault(tag, []).append((event.step, array))
    return found


def test_tensorboard_gets_the_whole_model(
    launched: Launched, plain: dict[str, Any]
) -> None:
    pytest.importorskip("tensorboard")
    there, here = launched.there / "board", launched.here / "board"
    assert len(list(there.rglob("events.out.tfevents.*.v2"))) == 2  # train, validation
    events, expected = events_of(there), events_of(here)
    assert set(events) == set(expected)
    assert {"train graph", "train batch_3", "train batch_loss"} < set(events)
    scalars = [tag for tag in events if "loss" in tag or "accuracy" in tag]
    histograms = [tag for tag in events if tag.endswith("/histogram")]
    assert len(histograms) == 9 and len(scalars) >= 6
    for tag in scalars + histograms:
        for (step, array), (other_step, other) in zip(
            events[tag], expected[tag], strict=True
        ):
            assert step == other_step
            assert array.shape == other.shape
            if tag in scalars:
                assert_close(array, other)
            else:  # histograms: left, right, count; close but for the counts
                assert_close(array[:, :2], other[:, :2])
    name = "board/train/keras_embedding.ckpt-2"
    assert (there / f"{name}.index").exists()
    assert "embeddings" in (there / "board/projector_config.pbtxt").read_text()


def test_one_process_writes_the_same_files(tmp_path: pathlib.Path) -> None:
    (value,) = run_ranks(1, run_stock_alone, str(tmp_path), timeout=60)
    assert len(rows_of(tmp_path / "log.csv")[1]) == 5
    assert value["weights"]


def run_stock_alone(folder: str) -> Any:
    smp.init({"microbatches": 2})
    return files(smp.DistributedModel, folder)
