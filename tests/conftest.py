"""What holds for all tests: the repository is importable, nothing is left behind."""

import os
import pathlib
import sys
from collections.abc import Iterator

import pytest

# `from tests.ranks import ranks` and `import smp_tf` work however pytest is started.
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

# Before the first import of TensorFlow in this process; ranks get the same.
os.environ.setdefault("TF_USE_LEGACY_KERAS", "1")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture(autouse=True)
def no_session_left() -> Iterator[None]:
    """Fail a test that leaves smp.init without smp.shutdown in pytest's own process."""
    yield
    smp_tf = sys.modules.get("smp_tf")
    if smp_tf is not None and smp_tf.is_initialized():
        smp_tf.shutdown()
        pytest.fail("the test left a session: it called smp.init, not smp.shutdown")


@pytest.fixture(scope="session", autouse=True)
def no_shared_memory_left() -> Iterator[None]:
    """Fail the run when it leaves shared memory behind, also after kill -9."""
    before = _segments()
    yield
    left = _segments() - before
    assert not left, f"shared memory left behind: {sorted(left)}"


def _segments() -> set[str]:
    """UCX's files in /dev/shm, and System V segments whose creator is gone."""
    files = {path.name for path in pathlib.Path("/dev/shm").glob("*ucx*")}
    table = pathlib.Path("/proc/sysvipc/shm")
    if not table.exists():
        return files
    columns, *rows = (line.split() for line in table.read_text().splitlines())
    segments = [dict(zip(columns, row)) for row in rows]
    return files | {
        f"shmid={segment['shmid']}"
        for segment in segments
        if not pathlib.Path("/proc", segment["cpid"]).exists()
    }
