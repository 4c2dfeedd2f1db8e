"""A checkpoint restores into any number of partitions, and into plain Keras."""

import pathlib
import pickle
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from tests.checkpoint.manager_jobs import (
    assert_same,
    batches,
    merged,
    net,
    optimizer_of,
    start,
    trainer,
    values_of,
)
from tests.ranks import run_ranks

SIZES = (2, 3, 4, 1)  # each restores what those before it, and itself, have saved


def job(base: Any) -> tuple[Any, Any, Any]:
    model, optimizer = net(base, dropout=0.25), optimizer_of("new")
    return model, optimizer, tf.train.Checkpoint(optimizer=optimizer, model=model)


def everything(checkpoint: Any) -> dict[str, Any]:
    """The values of all ranks."""
    return merged(smp.allgather(values_of(checkpoint), smp.WORLD))


def saves_and_restores(folder: str, size: int) -> None:
    start()
    model, optimizer, checkpoint = job(smp.DistributedModel)
    train, data = trainer(model, optimizer), iter(batches())
    for _ in range(2):
        train(*next(data))
    manager = smp.CheckpointManager(checkpoint, f"{folder}/{size}", max_to_keep=1)
    manager.save(blocking=False)
    train(*next(data))  # while it is written
    manager.save()
    assert manager.checkpoints == [manager.latest_checkpoint]
    expected = everything(checkpoint)
    batch = next(iter(batches()))
    train(*batch)
    following = everything(checkpoint)
    if smp.rank() == 0:
        file = pathlib.Path(folder, f"{size}.values")
        file.write_bytes(pickle.dumps((expected, following)))
    for source in SIZES[: SIZES.index(size) + 1]:
        file = pathlib.Path(folder, f"{source}.values")
        smp.barrier()
        values, following = pickle.loads(file.read_bytes())
        prefix = f"{folder}/{source}/ckpt-2"
        # After a step: all is there.
        train(*next(data))
        assert smp.CheckpointManager(checkpoint, folder).restore(prefix)
        assert_same(everything(checkpoint), values)
        train(*batch)  # drops what would have been dropped
        assert_same(everything(checkpoint), following)
    # Before the first step: what is not there waits; a step of the saved and of the
    # restored job must then be the same.
    model, optimizer, other = job(smp.DistributedModel)
    smp.CheckpointManager(other, folder).restore(f"{folder}/{SIZES[0]}/ckpt-2")
    trainer(model, optimizer)(*batch)
    file = pathlib.Path(folder, f"{SIZES[0]}.values")
    assert_same(everything(other), pickle.loads(file.read_bytes())[1])
    if size == 1:
        into_plain_keras(folder)


def into_plain_keras(folder: str) -> None:
    model, optimizer, checkpoint = job(tf.keras.Model)
    model(next(iter(batches()))[0])
    optimizer.build(model.trainable_variables)
    for source in SIZES:
        file = pathlib.Path(folder, f"{source}.values")
        manager = smp.CheckpointManager(checkpoint, f"{folder}/{source}")
        assert manager.restore() is not None
        assert_same(values_of(checkpoint), pickle.loads(file.read_bytes())[0])


@pytest.mark.timeout(400)
def test_any_number_of_partitions(tmp_path: pathlib.Path) -> None:
    for size in SIZES:
        run_ranks(size, saves_and_restores, str(tmp_path), size, timeout=100)
