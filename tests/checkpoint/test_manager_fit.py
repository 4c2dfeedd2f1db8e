"""``CheckpointCallback`` with a ``smp.CheckpointManager``, and going on from there."""

import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.checkpoint.manager_jobs import ROWS, batches, net, start
from tests.ranks import run_ranks


def made(folder: str) -> tuple[Any, Any]:
    model = net(smp.DistributedModel)
    inner = tf.keras.optimizers.Adam(0.01)
    model.compile(tf.keras.mixed_precision.LossScaleOptimizer(inner), "mse")
    checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
    return model, smp.CheckpointManager(checkpoint, folder, max_to_keep=2)


def interrupted(folder: str) -> None:
    """Six batches equal three, and a new model that goes on with the others."""
    start()
    pairs = zip(*batches().take(6).as_numpy_iterator())
    x, y = (np.concatenate(each) for each in pairs)
    data = tf.data.Dataset.from_tensor_slices((x, y)).batch(ROWS)
    whole, _ = made(f"{folder}/unused")
    whole.fit(data, verbose=0)
    tf.keras.utils.set_random_seed(5)
    model, manager = made(folder)
    save = smp.callbacks.CheckpointCallback(manager, every=3)
    model.fit(data.take(5), callbacks=[save], verbose=0)
    assert [each[-6:] for each in manager.checkpoints] == ["ckpt-1"]
    other, manager = made(folder)
    assert manager.restore() is not None
    other.fit(data.skip(3), verbose=0)
    assert int(other.optimizer.iterations) == 6
    for a, b in zip(other.get_weights(), whole.get_weights(), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.timeout(100)
def test_fit_goes_on_from_a_checkpoint(tmp_path: pathlib.Path) -> None:
    run_ranks(2, interrupted, str(tmp_path), timeout=90)
