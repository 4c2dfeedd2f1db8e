"""Jobs that MPI starts: ranks, messages and Horovod's world are as under horovodrun."""

import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest

from tests.ranks import ROOT

SIZE = 4
MPIRUN = shutil.which("mpirun")
pytestmark = [
    pytest.mark.timeout(150),
    pytest.mark.skipif(MPIRUN is None, reason="no mpirun (Debian: openmpi-bin)"),
    pytest.mark.skipif(
        importlib.util.find_spec("mpi4py") is None, reason="mpi4py is not installed"
    ),
]

# Two sessions of 2 partitions x 2 replicas. The second ends in order, or because rank 1
# fails while rank 0 waits for it in Horovod and the others in the transport.
SCRIPT = """
import sys
import smp_tf as smp

for placement in ("cluster", "spread"):
    smp.shutdown()
    smp.init({"partitions": 2, "placement_strategy": placement, "horovod": True,
              "timeout_s": 60})
    import horovod.tensorflow as hvd
    import tensorflow as tf

    mine = tf.constant([float(smp.rank())])
    mean = float(hvd.allreduce(mine, name="mean")[0])
    group = smp.get_dp_group()
    assert mean == sum(group) / 2, (mean, group)
    assert (hvd.rank(), hvd.size()) == (smp.dp_rank(), smp.dp_size())
    assert (hvd.local_rank(), hvd.local_size()) == (smp.dp_rank(), smp.dp_size())
    assert (smp.local_rank(), smp.local_size()) == (smp.rank(), smp.size())
    assert smp.allgather(smp.rank(), smp.WORLD) == [0, 1, 2, 3]
    how = "mpi" if hvd.mpi_enabled() else "gloo"
    print(f"rank {smp.rank()} of {placement}: {group} by {how}", flush=True)

if sys.argv[1] == "fails":
    if smp.rank() == 1:
        raise ValueError("boom")
    if smp.rank() == 0:
        hvd.allreduce(mine, name="waits")
    smp.recv_from(1, smp.WORLD_RANK)
"""

# The script that horovodrun's ranks train with, and its truth, plain Keras.
TRAINS = """
import numpy as np
import smp_tf as smp
from tests.multiproc import test_horovod_world as script

smp.init({"partitions": 2, "microbatches": 2, "horovod": True, "timeout_s": 60})
mine, expected = script._train(script.STEPS), script._one_process()
for name, value in mine.items():
    np.testing.assert_allclose(value, expected[name], **script.TOLERANCE)
print(f"rank {smp.rank()} has trained {len(mine)} variables", flush=True)
"""

# One rank has another idea of the configuration; all learn of it through MPI.
DIFFERS = """
import os
import smp_tf as smp

smp.init({"microbatches": 1 + (os.environ["OMPI_COMM_WORLD_RANK"] == "2")})
"""


def _run(folder: pathlib.Path, text: str, *args: str, **variables: str) -> tuple:
    """Exit code and output of a script that mpirun starts."""
    assert MPIRUN is not None
    script = folder / "script.py"
    script.write_text(text)
    done = subprocess.run(
        [MPIRUN, "--oversubscribe", "-np", str(SIZE), sys.executable, script, *args],
        env={
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "",
            "OMPI_ALLOW_RUN_AS_ROOT": "1",
            "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
            "PYTHONPATH": str(ROOT),
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_USE_LEGACY_KERAS": "1",
            **variables,
        },
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=120,
    )
    return done.returncode, done.stdout


def _backends() -> list[str]:
    """How Horovod's worlds can be made here."""
    import horovod.tensorflow as hvd

    return ["mpi", "gloo"] if hvd.mpi_built() else ["gloo"]


def test_the_dp_group_is_the_world_of_horovod(tmp_path: pathlib.Path) -> None:
    code, output = _run(tmp_path, SCRIPT, "ends")
    assert code == 0, output
    for rank in range(SIZE):
        how = _backends()[0]
        for placement, mates in ("cluster", (rank % 2, rank % 2 + 2)), (
            "spread",
            (rank // 2 * 2, rank // 2 * 2 + 1),
        ):
            line = f"rank {rank} of {placement}: {list(mates)} by {how}"
            assert line in output, output


@pytest.mark.parametrize("how", ["gloo", "mpi"])
def test_replicas_of_partitions_train(tmp_path: pathlib.Path, how: str) -> None:
    if how not in _backends():
        pytest.skip("Horovod was built without MPI")
    code, output = _run(tmp_path, TRAINS, HOROVOD_CONTROLLER=how)
    assert code == 0, output
    for rank in range(SIZE):
        assert f"rank {rank} has trained 4 variables" in output, output


@pytest.mark.parametrize("how", ["gloo", "mpi"])
def test_a_failure_ends_the_job(tmp_path: pathlib.Path, how: str) -> None:
    if how not in _backends():
        pytest.skip("Horovod was built without MPI")
    code, output = _run(tmp_path, SCRIPT, "fails", HOROVOD_CONTROLLER=how)
    assert code != 0, output
    assert f"by {how}" in output, output
    # MPI's launcher gives the others a second to say so.
    assert re.search("rank 1 failed: ValueError: boom", output), output


def test_ranks_that_differ_are_told_so(tmp_path: pathlib.Path) -> None:
    code, output = _run(tmp_path, DIFFERS)
    assert code != 0, output
    assert "`microbatches`: 1 on ranks 0, 1, 3; 2 on rank 2" in output, output
