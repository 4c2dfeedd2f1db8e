"""A death in the middle of a commit, of which some ranks hear and others do not."""

import os
import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.checkpoint import saving
from tests.checkpoint.manager_jobs import batches, net, optimizer_of, start, trainer
from tests.ranks import run_ranks, start_ranks

DEATH = 17  # the exit code of rank 1


def trained(directory: str, steps: int) -> smp.CheckpointManager:
    start()
    model, optimizer = net(smp.DistributedModel), optimizer_of("new")
    checkpoint = tf.train.Checkpoint(optimizer=optimizer, model=model)
    train, data = trainer(model, optimizer), iter(batches())
    for _ in range(steps):
        train(*next(data))
    return smp.CheckpointManager(checkpoint, directory, max_to_keep=1)


def hears_of_a_death(call: str, function: Callable[[], Any]) -> Any:
    """Every other rank gets all answers; this one does not get the last of them."""
    found = everywhere(call, function)
    if call == "save: commit":
        raise smp.TransportError("rank 2 died")
    return found


everywhere = saving.everywhere


def dies_in_commit(directory: str) -> None:
    manager = trained(directory, 1)
    manager.save()
    if smp.rank() == 0:
        manager.save()  # for this rank it is whole: it says so
        return
    saving.everywhere = hears_of_a_death
    with pytest.raises(smp.TransportError, match="rank 2 died"):
        manager.save()
    os._exit(DEATH)


def goes_on(directory: str) -> str | None:
    manager = trained(directory, 1)
    assert manager.restore() == manager.latest_checkpoint
    return manager.save()


@pytest.mark.timeout(200)
def test_a_save_that_one_rank_takes_for_whole_is_kept(tmp_path: pathlib.Path) -> None:
    died = start_ranks(2, dies_in_commit, str(tmp_path), timeout=90)
    assert [each.exit_code for each in died] == [1, DEATH], str(died[0])
    assert "rank 1" in str(died[0])
    parts = [tmp_path / f"mp_rank_{k}" for k in range(2)]
    said = [tf.train.latest_checkpoint(str(part)) for part in parts]
    assert said == [str(parts[0] / "ckpt-2"), str(parts[1] / "ckpt-1")]
    saved = run_ranks(2, goes_on, str(tmp_path), timeout=90)
    assert saved == [str(part / "ckpt-3") for part in parts]
    assert sorted(each.name for each in parts[1].glob("*.index")) == ["ckpt-3.index"]
