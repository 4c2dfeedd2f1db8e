"""A save in the background when the script ends: whole, or the job has failed."""

import pathlib
import resource
import signal
import sys
import time
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.runtime import session
from tests.ranks import start_ranks


class Part(tf.Module):
    def __init__(self) -> None:
        super().__init__()
        self.value = tf.Variable(tf.ones([100_000]))


def saving(folder: str, timeout_s: float = 20.0) -> Any:
    smp.init({"timeout_s": timeout_s})
    checkpoint = tf.train.Checkpoint(parts=[Part() for _ in range(smp.size())])
    return smp.CheckpointManager(checkpoint, folder)


def full_disk() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))


def ends(folder: str, how: str) -> None:
    manager = saving(folder)
    if smp.rank() == 1 and how != "well":
        full_disk()
    manager.save(blocking=False)
    if how == "shutdown":
        with pytest.raises(smp.SmpError, match="rank 1: .*free space"):
            smp.shutdown()
        assert not smp.is_initialized()
        smp.shutdown()


@pytest.mark.parametrize("how", ["shutdown", "by itself", "well"])
def test_an_error_of_the_last_save_is_seen(tmp_path: pathlib.Path, how: str) -> None:
    found = start_ranks(2, ends, str(tmp_path), how, timeout=40)
    code = 1 if how == "by itself" else 0
    told = "\n".join(map(str, found))
    assert [each.exit_code for each in found] == [code, code], told
    for each in found:
        is_told = "at the end of the script: rank 1: " in each.output
        assert is_told == (how == "by itself"), each
    assert (tmp_path / "mp_rank_0" / "ckpt-1.manifest.json").exists() == (how == "well")


def exits(folder: str) -> None:
    manager = saving(folder, timeout_s=300.0)
    manager.save(blocking=False)
    session._EXIT_SECONDS = 3.0
    if smp.rank() == 1:
        sys.exit(3)
    began = time.monotonic()
    with pytest.raises(smp.TransportError):
        smp.recv_from(1, smp.WORLD_RANK)
    assert time.monotonic() - began < 30
    with pytest.raises(smp.TransportError):
        manager.wait()


@pytest.mark.timeout(100)
def test_a_rank_that_exits_is_not_waited_for(tmp_path: pathlib.Path) -> None:
    found = start_ranks(2, exits, str(tmp_path), timeout=60)
    assert [each.exit_code for each in found] == [0, 1], "\n".join(map(str, found))
    # The files stay: the next save removes them, if nobody looks at them.
    assert list(tmp_path.glob("mp_rank_1/ckpt-1.*"))
