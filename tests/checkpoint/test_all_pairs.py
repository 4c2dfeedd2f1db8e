"""p partitions save, q restore: all 16 pairs, also to fewer and to more.

The model has tied weights, and the loss scale has moved when it is saved.
"""

import pathlib
import pickle
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.checkpoint.manager_jobs import K, assert_same, merged, start, values_of
from tests.ranks import run_ranks

SIZES = (1, 2, 3, 4)
WORDS = 11
X = np.arange(8) % WORDS
Y = 3 * np.arange(8) % WORDS


class Net(smp.DistributedModel):
    """Its embedding is also its last layer, and a layer is used twice."""

    def __init__(self) -> None:
        super().__init__(name="net")
        self.embedding = K.layers.Embedding(WORDS, 6)
        self.twice = K.layers.Dense(6)
        self.hidden = [K.layers.Dense(6, "tanh") for _ in range(4)]
        self.norm = K.layers.BatchNormalization()
        self.drop = K.layers.Dropout(0.2)

    def call(self, x: Any, training: bool | None = None) -> Any:
        y = self.twice(self.embedding(x))
        for layer in self.hidden:
            y = layer(y)
        y = self.drop(self.norm(y, training=training), training=training)
        return tf.matmul(self.twice(y), self.embedding.embeddings, transpose_b=True)


def job() -> tuple[Any, Any]:
    K.utils.set_random_seed(5)
    model = Net()
    optimizer = K.mixed_precision.LossScaleOptimizer(
        K.optimizers.Adam(0.01), initial_scale=8.0, dynamic_growth_steps=2
    )
    model.compile(optimizer, K.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model, tf.train.Checkpoint(model=model, optimizer=optimizer)


def train(model: Any, steps: int) -> None:
    for _ in range(steps):
        model.train_on_batch(X, Y)


def everything(checkpoint: Any) -> dict[str, Any]:
    """The values of all ranks."""
    return merged(smp.allgather(values_of(checkpoint), smp.WORLD))


def saves(folder: str, size: int) -> None:
    start()
    model, checkpoint = job()
    train(model, 3)
    assert float(model.optimizer.loss_scale) == 16.0
    smp.CheckpointManager(checkpoint, f"{folder}/{size}").save()
    now = everything(checkpoint)
    train(model, 2)
    found = (now, everything(checkpoint))
    if smp.rank() == 0:
        pathlib.Path(folder, f"{size}.values").write_bytes(pickle.dumps(found))


def restores(folder: str) -> None:
    start()
    late, late_checkpoint = job()
    train(late, 2)
    for size in SIZES:
        values = pathlib.Path(folder, f"{size}.values").read_bytes()
        now, later = pickle.loads(values)
        # After a step, all is there at once.
        assert smp.CheckpointManager(late_checkpoint, f"{folder}/{size}").restore()
        assert_same(everything(late_checkpoint), now)
        train(late, 2)
        assert_same(everything(late_checkpoint), later)
    # Before the first one.
    model, checkpoint = job()
    assert smp.CheckpointManager(checkpoint, f"{folder}/{SIZES[-1]}").restore()
    train(model, 2)
    assert_same(everything(checkpoint), later)


@pytest.mark.timeout(500)
def test_every_number_of_partitions_restores_every_other(
    tmp_path: pathlib.Path,
) -> None:
    for size in SIZES:
        run_ranks(size, saves, str(tmp_path), size, timeout=100)
    for size in SIZES:
        run_ranks(size, restores, str(tmp_path), timeout=100)
