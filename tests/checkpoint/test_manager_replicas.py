"""Checkpoints of replicas, also with sharded optimizer state, into other layouts."""

import pathlib
import resource
import signal
from typing import Any

import numpy as np
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

SHARDED = {"horovod": True, "shard_optimizer_state": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "2 x 2 sharded": (2, SHARDED),
    "2 x 2": (2, {"horovod": True}),
    "4 partitions": (4, {}),
    "1 x 4 sharded": (1, {**SHARDED, "placement_strategy": "spread"}),
}


def job() -> tuple[Any, Any]:
    """(the checkpoint, what trains with one batch of all replicas)."""
    model = net(smp.DistributedModel)
    optimizer = smp.DistributedOptimizer(optimizer_of("new"))
    train = trainer(model, optimizer)

    def each(x: Any, y: Any) -> None:
        mine = slice(smp.dp_rank(), None, smp.dp_size())
        train(x[mine], y[mine])

    return tf.train.Checkpoint(optimizer=optimizer, model=model), each


def everything(checkpoint: Any) -> dict[str, Any]:
    """Name -> value. Moving averages are each replica's own; the first one's count."""
    mine = values_of(checkpoint)
    if smp.dp_rank():
        mine = {name: value for name, value in mine.items() if "/moving_" not in name}
    return merged(smp.allgather(mine, smp.WORLD))


def through_all_layouts(folder: str) -> None:
    """Each layout restores what the one before it has saved, and trains on."""
    before: dict[str, Any] = {}
    for number, (partitions, config) in enumerate(LAYOUTS.values()):
        start(partitions, **config, microbatches=1)
        data = iter(batches())
        checkpoint, train = job()
        manager = smp.CheckpointManager(checkpoint, folder)
        if number:
            train(*next(data))  # other values, to be replaced
            assert manager.restore() is not None
            assert_same(everything(checkpoint), before)
        for _ in range(2):
            train(*next(data))
        if config.get("shard_optimizer_state"):
            count = sum("/slot/" in name for name in values_of(checkpoint))
            counts = smp.allgather(count, smp.DP_GROUP)
            before = everything(checkpoint)
            slots = sum("/slot/" in name for name in before)
            assert all(0 < each < slots for each in counts), (counts, slots)
        before = everything(checkpoint)
        manager.save(blocking=False)
        smp.shutdown()  # waits until it is whole
    start(2, horovod=True, microbatches=1)
    checkpoint, train = job()
    manager = smp.CheckpointManager(checkpoint, folder)
    assert manager.latest_checkpoint == f"{folder}/mp_rank_{smp.mp_rank()}/ckpt-4"
    fails_in_the_background(checkpoint, train, folder)


def fails_in_the_background(checkpoint: Any, train: Any, folder: str) -> None:
    """A disk that is full on one rank: told to all at the next call."""
    manager = smp.CheckpointManager(checkpoint, folder)
    manager.restore()
    train(*next(iter(batches())))
    expected = everything(checkpoint)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    if smp.rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    manager.save(blocking=False)
    with pytest.raises(smp.SmpError, match="rank 0") as caught:
        manager.wait()
    if smp.rank() == 0:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    assert len(set(smp.allgather(str(caught.value), smp.WORLD))) == 1
    assert str(manager.latest_checkpoint).endswith("ckpt-4")
    assert str(manager.save()).endswith("ckpt-5")
    assert_same(everything(checkpoint), expected)
    smp.shutdown()


@pytest.mark.timeout(240)
def test_replicas_and_shards_are_no_part_of_a_checkpoint(
    tmp_path: pathlib.Path,
) -> None:
    run_ranks(4, through_all_layouts, str(tmp_path), timeout=220)
    assert np.all([(tmp_path / f"mp_rank_{k}").is_dir() for k in range(4)])
