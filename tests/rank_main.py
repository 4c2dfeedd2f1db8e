"""What one rank of ``tests.ranks`` runs: find the function, call it, keep the result.

An exception is written down and then left alone, so that it ends the process exactly as
it would end a user's script (``sys.excepthook``, ``atexit``, the exit code).
"""

import contextlib
import ctypes
import faulthandler
import importlib.util
import inspect
import os
import pathlib
import pickle
import signal
import sys
import traceback
from typing import Any

_PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Nothing outlives the test process, not even when that is killed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def main() -> None:
    die_with_parent()
    # A shell that starts the tests in the background makes its children ignore Ctrl-C.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A core that went away (another container's limits) is no reason to fail.
    with contextlib.suppress(OSError):
        os.sched_setaffinity(0, [int(os.environ["SMP_TEST_CORE"])])
    if fake := os.environ.get("SMP_TEST_FAKE_DEVICE"):
        from tests.fake_device import library

        library.load(pathlib.Path(fake))
    folder = pathlib.Path(os.environ["SMP_TEST_FOLDER"])
    work = pickle.loads((folder / "work").read_bytes())
    faulthandler.enable()
    faulthandler.dump_traceback_later(work["timeout"], exit=True)
    result = folder / f"outcome.{os.environ['HOROVOD_RANK']}"
    try:
        value = _function(work["file"], work["name"])(*work["args"], **work["kwargs"])
        result.write_bytes(pickle.dumps((value, None)))
    except Exception:
        result.write_bytes(pickle.dumps((None, traceback.format_exc())))
        raise


def _function(file: str, name: str) -> Any:
    spec = importlib.util.spec_from_file_location(pathlib.Path(file).stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return inspect.unwrap(getattr(module, name))


if __name__ == "__main__":
    main()
