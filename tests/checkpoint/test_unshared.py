"""Hosts that do not share the directory: each rank sees its own parts only."""

import os
import pathlib
import tempfile
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from tests.checkpoint.manager_jobs import (
    assert_same,
    batches,
    net,
    optimizer_of,
    start,
    trainer,
    values_of,
)
from tests.ranks import run_ranks


def job(kind: str) -> tuple[Any, Any]:
    model, optimizer = net(smp.DistributedModel), optimizer_of(kind)
    checkpoint = tf.train.Checkpoint(optimizer=optimizer, model=model)
    return checkpoint, trainer(model, optimizer)


def copied(place: pathlib.Path) -> list[str]:
    """What this rank has of parts of others, while it is needed."""
    found = place.glob("smp-checkpoint-*/*/*")
    return sorted(path.relative_to(place).parts[1] for path in found)


def on_hosts_of_their_own(folder: str, kind: str) -> None:
    """The same path leads every rank to another place."""
    place = pathlib.Path(folder, f"host_{launched_rank()}")
    os.chdir(place)
    tempfile.tempdir = str(place)
    start()
    checkpoint, train = job(kind)
    manager = smp.CheckpointManager(checkpoint, "saves")
    data = iter(batches())
    train(*next(data))
    manager.save()
    assert os.listdir("saves") == [f"mp_rank_{smp.mp_rank()}"]
    values = values_of(checkpoint)
    train(*next(data))
    assert manager.restore()  # all is there: copies go at once
    assert_same(values_of(checkpoint), values)
    assert copied(place) == []
    batch = next(data)
    train(*batch)
    values = values_of(checkpoint)
    other, train = job(kind)  # before its first step
    manager = smp.CheckpointManager(other, "saves")
    assert manager.restore() == f"saves/mp_rank_{smp.mp_rank()}/ckpt-1"
    assert set(copied(place)) == {f"mp_rank_{1 - smp.mp_rank()}"}
    train(*batch)
    assert_same(values_of(other), values)
    assert copied(place) == []
    file = next(pathlib.Path("saves").glob("*/ckpt-1.data-*"))
    smp.barrier()
    if smp.rank() == 1:
        file.write_bytes(b"")
    smp.barrier()
    with pytest.raises(smp.ConfigError, match="rank 1: .*cut.*mp_rank_1/ckpt-1"):
        manager.restore()
    assert copied(place) == []


def launched_rank() -> int:
    return int(os.environ["HOROVOD_RANK"])


@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["new", "legacy"])
def test_parts_travel_to_who_needs_them(tmp_path: pathlib.Path, kind: str) -> None:
    for rank in range(2):
        (tmp_path / f"host_{rank}").mkdir()
    run_ranks(2, on_hosts_of_their_own, str(tmp_path), kind, timeout=100)
