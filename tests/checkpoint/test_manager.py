"""smp.CheckpointManager: what is restored is what was saved, in any layout."""

import os
import pathlib
import pickle
import random
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.checkpoint.manager_jobs import (
    K,
    assert_same,
    batches,
    net,
    optimizer_of,
    start,
    trainer,
    values_of,
)
from tests.ranks import run_ranks, start_ranks

# --- exact resume: 10 steps are 5, a death, and 5 -------------------------------------

KINDS = ("new", "legacy")  # the latter with Keras's other generator in its Dropout
DEATH = 17  # the exit code of rank 1


def story(directory: str, kind: str, steps: int, saves_at: int | None) -> Any:
    """Train to ``steps``, from the latest checkpoint if there is one; (values, losses,
    random numbers at the end)."""
    K.utils.set_random_seed(5)
    if kind == "legacy":
        K.backend.experimental.enable_tf_random_generator()
    model, optimizer = net(smp.DistributedModel, dropout=0.25), optimizer_of(kind)
    K.backend.experimental.disable_tf_random_generator()
    step, iterator = tf.Variable(0), iter(batches())
    checkpoint = tf.train.Checkpoint(
        optimizer=optimizer, model=model, step=step, iterator=iterator
    )
    manager = smp.CheckpointManager(checkpoint, directory, step_counter=step)
    restored = manager.restore()
    assert restored == manager.latest_checkpoint
    train, losses = trainer(model, optimizer), []
    while int(step) < steps:
        x, y = next(iterator)
        x = x + 0.1 * np.random.rand() + 0.1 * random.random()
        losses.append(float(train(x, y)))
        step.assign_add(1)
        if int(step) == saves_at:
            assert manager.save() == manager.latest_checkpoint
    return values_of(checkpoint), losses, (random.random(), np.random.rand())


def first_launch(folder: str) -> None:
    start()
    for kind in KINDS:
        whole = story(f"{folder}/{kind}/whole", kind, 10, None)
        file = pathlib.Path(folder, f"{kind}.{smp.rank()}")
        file.write_bytes(pickle.dumps(whole))
        story(f"{folder}/{kind}/dies", kind, 5, 5)
    smp.barrier()
    if smp.rank() == 1:
        os._exit(DEATH)
    smp.barrier()


def second_launch(folder: str) -> list[str]:
    start()
    for kind in KINDS:
        file = pathlib.Path(folder, f"{kind}.{smp.rank()}")
        values, losses, numbers = pickle.loads(file.read_bytes())
        again = story(f"{folder}/{kind}/dies", kind, 10, None)
        assert again[1] == losses[5:], (kind, again[1], losses)
        assert_same(again[0], values)
        assert again[2] == numbers, kind
    return sorted(values)


@pytest.mark.timeout(240)
def test_a_killed_job_goes_on_exactly_where_it_was(tmp_path: pathlib.Path) -> None:
    died = start_ranks(2, first_launch, str(tmp_path), timeout=110)
    assert [each.exit_code for each in died] == [1, DEATH], str(died[0])
    names = run_ranks(2, second_launch, str(tmp_path), timeout=110)
    assert len(set(names[0]) ^ set(names[1])) > 8  # partitions
