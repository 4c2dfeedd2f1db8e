"""``fit`` on replicas of a model (``horovod: true``): 2 x 2 ranks, and plain Keras."""

import csv
import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.keras.scripts import crossentropy, data, dense_net
from tests.ranks import run_ranks

keras = tf.keras
ROWS, EACH, EPOCHS, SECONDS = 48, 8, 4, 20.0  # EACH: examples of a replica in a batch
X, Y = data(ROWS)
TEST_X, TEST_Y = data(26)
FLOATS = {"rtol": 2e-5, "atol": 2e-6}


def compiled(base: type, optimizer: Any = None) -> Any:
    model = dense_net(base, kernel_regularizer="l2")
    optimizer = optimizer or keras.optimizers.Adam(0.02)
    model.compile(optimizer, crossentropy(), ["accuracy"])
    return model


def deciding(folder: str) -> list[Any]:
    """Callbacks that decide by figures which no replica could know alone."""
    return [
        keras.callbacks.ReduceLROnPlateau(
            "val_loss", factor=0.5, patience=1, min_delta=1.0
        ),
        keras.callbacks.EarlyStopping("val_accuracy", patience=2, min_delta=0.6),
        keras.callbacks.CSVLogger(f"{folder}/log.csv"),
    ]


def plainly(folder: str) -> tuple[dict[str, list[float]], list[Any]]:
    """The same training in one process: batches of both replicas' examples."""
    keras.utils.set_random_seed(100)  # that of the first replica
    model = compiled(keras.Model)
    history = model.fit(
        X,
        Y,
        batch_size=2 * EACH,
        epochs=EPOCHS,
        shuffle=False,
        validation_data=(TEST_X, TEST_Y),
        callbacks=deciding(folder),
        verbose=0,
    )
    return history.history, [each.numpy() for each in model.weights]


def distributed(folder: str) -> tuple[dict[str, list[float]], list[Any]]:
    keras.utils.set_random_seed(100 + smp.dp_rank())
    model = compiled(smp.DistributedModel)
    train = smp.shard_dataset(tf.data.Dataset.from_tensor_slices((X, Y))).batch(EACH)
    mine = slice(0, 17) if smp.dp_rank() == 0 else slice(17, 26)  # unequal on purpose
    history = model.fit(
        train,
        epochs=EPOCHS,
        validation_data=(TEST_X[mine], TEST_Y[mine]),
        validation_batch_size=4,
        callbacks=deciding(folder),
        verbose=0,
    )
    return history.history, model.get_weights()


def train_and_compare(folder: str, config: dict[str, Any]) -> list[str]:
    """Fails or returns the lines for the table."""
    smp.init({"partitions": 2, "microbatches": 4, "horovod": True, **config})
    mine = Path(folder, f"{config}", "together")
    plain = Path(folder, f"{config}", f"rank_{smp.rank()}")
    for each in (mine, plain):
        each.mkdir(parents=True, exist_ok=True)
    history, weights = distributed(str(mine))
    expected, whole = plainly(str(plain))
    assert history.keys() == expected.keys()
    worst = 0.0
    for name in expected:
        np.testing.assert_allclose(history[name], expected[name], **FLOATS)
    for a, b in zip(weights, whole, strict=True):
        np.testing.assert_allclose(a, b, **FLOATS)
        worst = max(worst, float(np.max(np.abs(a - b))))
    everyone = smp.allgather(history, smp.WORLD)
    assert all(each == everyone[0] for each in everyone), "bit for bit on all ranks"
    assert len(set(expected["lr"])) > 1 and len(expected["lr"]) < EPOCHS, "as planned"
    smp.barrier()
    with open(mine / "log.csv") as file:
        assert len(list(csv.DictReader(file))) == len(history["loss"])
    smp.shutdown()
    return [f"{config}: weights within {worst:.1e} of plain Keras"]


def both_placements(folder: str) -> list[str]:
    lines = train_and_compare(folder, {"placement_strategy": "cluster"})
    lines += train_and_compare(
        folder, {"placement_strategy": "spread", "shard_optimizer_state": True}
    )
    return lines


@pytest.mark.timeout(240)
def test_two_replicas_train_like_one_process_with_both_batches(tmp_path: Path) -> None:
    for lines in run_ranks(4, both_placements, str(tmp_path), timeout=220)[:1]:
        print(*lines, sep="\n")


# --- what replicas must do alike


def fit(x: Any, y: Any = None, **options: Any) -> Any:
    model = compiled(smp.DistributedModel, "sgd")
    return model.fit(x, y, verbose=0, **options)


def other_lengths() -> None:
    fit(X[: 16 + 16 * smp.dp_rank()], Y[: 16 + 16 * smp.dp_rank()], batch_size=8)


def other_epochs() -> None:
    mine = slice(smp.dp_rank(), None, 2)
    fit(X[mine], Y[mine], batch_size=8, epochs=1 + smp.dp_rank())


def evaluate_on_one() -> None:
    model = compiled(smp.DistributedModel, "sgd")
    if smp.dp_rank():
        fit(X, Y)
    else:
        model.evaluate(X, Y, verbose=0)


REFUSED = {
    other_lengths: "rank 0: 2 batches; rank 2: 4 batches",
    other_epochs: "fit(epochs=2)",
    evaluate_on_one: "rank 0: evaluate(); rank 2: fit()",
}


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def of_unknown_length() -> Iterator[Any]:
    for i in range(2 + smp.dp_rank()):
        rows = slice(8 * (2 * i + smp.dp_rank()), 8 * (2 * i + smp.dp_rank()) + 8)
        yield X[rows], Y[rows]


def try_all() -> dict[str, Any]:
    found: dict[str, Any] = {}
    for case in REFUSED:
        smp.init({"partitions": 2, "horovod": True, "timeout_s": SECONDS})
        begin = time.monotonic()
        try:
            case()
            text = "no error"
        except smp.SmpError as error:
            text = re.sub(r"\s+", " ", str(error))
        assert time.monotonic() - begin < SECONDS
        found[case.__name__] = text
        smp.shutdown()
    kept = Kept()
    logging.getLogger("smp_tf").addHandler(kept)
    smp.init({"partitions": 2, "horovod": True, "timeout_s": SECONDS})
    counted: list[int] = []

    def count_batch(batch: int, logs: Any = None) -> None:
        counted.append(batch)

    count = keras.callbacks.LambdaCallback(on_batch_end=count_batch)
    fit(of_unknown_length(), callbacks=[count])
    found["ended together"] = counted, list(kept.lines)
    del kept.lines[:]
    fit(X[:16], Y[:16], batch_size=8, shuffle=False)
    found["same data"] = list(kept.lines)
    smp.shutdown()
    return found


@pytest.mark.timeout(150)
def test_replicas_do_as_many_batches() -> None:
    every = run_ranks(4, try_all, timeout=140)
    for found in every:
        for case, expected in REFUSED.items():
            # Each rank speaks of its own dp_group: of ranks 0 and 2, or 1 and 3.
            text = found[case.__name__].replace("rank 1", "rank 0")
            assert expected in text.replace("rank 3", "rank 2"), (case, text)
        assert found["ended together"][0] == [0, 1]
    (warning,) = (each for each in every[0]["ended together"][1] if "epoch" in each)
    assert "no more data: batch=2 replicas=[0]" in warning
    (warning,) = (each for each in every[0]["same data"] if "same batches" in each)
    assert "smp.shard_dataset" in warning
