"""A job that is killed in a save goes on from the checkpoint before it: 50 kills.

Each job has two ranks. Both restore the latest checkpoint, then save again and again
until one of them is killed (-9) at a random moment; the other is stopped. What a job
restores must be whole, of one save on both ranks, and not older than the last save that
the job before it has called done.
"""

import os
import pathlib
import random
import signal
import threading

import pytest
import tensorflow as tf

import smp_tf as smp
from tests.ranks import start_ranks

KILLS = 50
NUM_VALUES, SHAPE = 4, (64, 64)


class Part(tf.Module):
    """What a rank has, without a step that would have to be traced first."""

    def __init__(self) -> None:
        super().__init__()
        self.values = [tf.Variable(tf.zeros(SHAPE)) for _ in range(NUM_VALUES)]


def save_until_killed(folder: str, victim: int, seconds: float) -> None:
    """Writes what it has restored, and every save that has ended, into files."""
    smp.init({"timeout_s": 20.0})
    parts = [Part(), Part()]
    mine = parts[smp.rank()]
    checkpoint = tf.train.Checkpoint(parts=parts)
    manager = smp.CheckpointManager(checkpoint, f"{folder}/saves", max_to_keep=2)
    manager.restore()
    found = {float(x) for each in mine.values for x in each.numpy().flat}
    log = pathlib.Path(folder, f"said_{smp.rank()}")
    (value,) = found  # not parts of several saves
    log.write_text(f"restored {value}\n")
    smp.barrier()
    if smp.rank() == victim:
        kill = (os.getpid(), signal.SIGKILL)
        threading.Timer(seconds, os.kill, kill).start()
    while True:
        value += 1
        for part in parts:
            for each in part.values:
                each.assign(tf.fill(SHAPE, value))
        manager.save()
        with log.open("a") as file:
            file.write(f"saved {value}\n")


@pytest.mark.timeout(300)
def test_fifty_kills_leave_a_loadable_checkpoint(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    chance, loadable, known = random.Random(7), 0, 0.0
    for number in range(KILLS + 1):
        victim, seconds = chance.randrange(2), 0.25 * chance.random()
        outcomes = start_ranks(
            2, save_until_killed, str(tmp_path), victim, seconds, timeout=30
        )
        assert outcomes[victim].exit_code == -signal.SIGKILL, outcomes[victim]
        said = [(tmp_path / f"said_{rank}").read_text().split("\n") for rank in (0, 1)]
        assert said[0][0] == said[1][0], said  # both restored the same save
        value = float(said[0][0].split()[1])
        # A save may have ended before it could say so.
        assert value in (known, known + 1), (value, known)
        loadable += number > 0
        done = [float(x.split()[1]) for lines in said for x in lines if "saved" in x]
        known = max([value, *done])
    with capsys.disabled():
        print(f"\nloadable={loadable} of {KILLS}")
    assert loadable == KILLS
