"""A rank that is forked is as a rank that is a fresh process."""

import atexit
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import numpy as np

from tests import rank_process
from tests.ranks import ROOT, Outcome, run_ranks, start_ranks

_OF_A_LAUNCH = {"HOROVOD_GLOO_RENDEZVOUS_PORT", "SMP_TEST_FOLDER"}


def _look() -> tuple[dict[str, Any], list[Any]]:
    """What must be the same in both, and what must differ between ranks."""
    libraries = Path("/proc/self/maps").read_text()
    import tensorflow as tf

    same = {
        "argv": sys.argv,
        "path": sys.path,
        "folder": os.getcwd(),
        "environment": {k: v for k, v in os.environ.items() if k not in _OF_A_LAUNCH},
        "session": os.getsid(0) == os.getpgid(0) == os.getpid(),
        "signals": [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)],
        "files": sorted(os.listdir("/proc/self/fd")),
        "cores": os.sched_getaffinity(0),
        "threads": len(os.listdir("/proc/self/task")),
        "loaded": [name in libraries for name in ("_smp_kernels", "mpi_lib", "ucp")],
        "in use": "horovod.tensorflow" in sys.modules,
    }
    # TensorFlow has no context yet: it takes a seed for each rank, and this.
    tf.config.threading.set_inter_op_parallelism_threads(3)
    drawn = tf.random.uniform([]).numpy(), random.random(), np.random.rand()
    return same, [hash("a"), *drawn]


def test_forked_and_fresh_ranks_are_alike() -> None:
    forked, fresh = run_ranks(3, _look), run_ranks(3, _look, fresh=True)
    for (found, _), (expected, _) in zip(forked, fresh, strict=True):
        assert found == expected
    (one, *drawn), (other, *more), (_, *most) = (each for _, each in forked)
    assert one != other  # hashes of neighbours: an order that depends on them is found
    assert len({*drawn, *more, *most}) == 9


def _end() -> str:
    rank = int(os.environ["HOROVOD_RANK"])
    atexit.register(print, "at exit")
    print("begun", end=" ")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if rank == 2:
        raise ValueError("on purpose")
    if rank == 3:
        sys.exit(7)
    while rank == 4:
        signal.pause()
    return "value"


def _ends(outcome: Outcome) -> tuple[Any, ...]:
    where = outcome.error and outcome.error.splitlines()[-1]
    lines = outcome.output.splitlines()
    ends = [lines[0], lines[-1]] if lines else []
    return outcome.exit_code, outcome.value, where, ends, outcome.timed_out


def test_they_end_alike_and_no_end_is_an_end_of_the_others() -> None:
    forked, fresh = (
        start_ranks(5, _end, timeout=20, endless=[4], fresh=fresh)
        for fresh in (False, True)
    )
    assert list(map(_ends, forked)) == list(map(_ends, fresh))
    assert [each.exit_code for each in forked] == [0, -9, 1, 7, -9]
    (again,) = run_ranks(1, _look)
    assert again[0]["session"]


def _path() -> list[str]:
    return sys.path


def test_what_is_read_at_import_makes_a_fresh_process(tmp_path: Path) -> None:
    path = f"{ROOT}{os.pathsep}{tmp_path}"
    (found,) = run_ranks(1, _path, env={"PYTHONPATH": path})
    assert str(tmp_path) in found


def test_a_process_number_that_comes_again_is_another_rank() -> None:
    """Linux gives them again after 32768 processes: fewer than a run of all tests."""
    server = rank_process._Server.__new__(rank_process._Server)
    server._ranks, theirs = multiprocessing.Pipe()
    server.ended, server._started = {}, []
    for message in (("started", 7), ("ended", 7, 0), ("started", 7)):
        theirs.send(message)
    server.receive_all()
    assert rank_process._ForkedRank(7, server).poll() is None
    theirs.send(("ended", 7, -9))
    assert rank_process._ForkedRank(7, server).poll() == -9
