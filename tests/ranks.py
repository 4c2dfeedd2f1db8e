"""Run a test in several real processes: ``@ranks(2)`` and ``run_ranks(2, function)``.

    test process                        rank 0, 1, .. (processes of ``rank_process``)
    Horovod's rendezvous store  <-----  HOROVOD_* as ``horovodrun --gloo`` sets them
    outcome.<r> files           <-----  the value returned, or the traceback

Every process has its own session, so that a time limit kills it with all it started;
a little before the limit it prints the stacks of its threads and exits by itself.
``start_ranks`` returns whatever happened (for tests of failures), ``run_ranks`` insists
on success and returns the values, and ``@ranks`` makes a test function of the body.

The function is found again in the child by its file and name, so it must be at the top
level of its module; arguments and results are pickled.
"""

import contextlib
import dataclasses
import functools
import inspect
import os
import pathlib
import pickle
import signal
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from horovod.runner.common.util.hosts import get_host_assignments, parse_hosts
from horovod.runner.http.http_server import RendezvousServer

from tests import rank_process
from tests.fake_device import library
from tests.rank_process import RankProcess

ROOT = pathlib.Path(__file__).resolve().parent.parent
_GRACE_SECONDS = 3.0  # between a rank's own time limit and the kill
_OUTPUT_SHOWN = 12_000  # characters of output per rank in a failure
_NOT_INHERITED = ("HOROVOD_", "OMPI_", "PMI", "SMP_", "SM_HP_", "NCCL_")


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What became of one rank.

    ``exit_code`` is negative for a signal; ``ended`` is ``time.monotonic()`` then;
    ``error`` is the traceback when the function raised, ``value`` what it returned.
    """

    rank: int
    exit_code: int
    ended: float
    output: str
    value: Any = None
    error: str | None = None
    timed_out: bool = False

    def __str__(self) -> str:
        how = " (time limit)" if self.timed_out else ""
        text = f"--- rank {self.rank}: exit code {self.exit_code}{how}\n"
        return text + self.output[-_OUTPUT_SHOWN:].rstrip() + "\n"


def ranks(size: int, timeout: float = 60.0, **options: Any) -> Callable[..., Any]:
    """Decorator: the body of the test runs in ``size`` processes at once.

    Parameters and fixtures reach every rank if they can be pickled. Options are those
    of ``run_ranks``.
    """

    def decorate(function: Callable[..., Any]) -> Callable[..., None]:
        @functools.wraps(function)
        def test(**parameters: Any) -> None:
            run_ranks(size, function, timeout=timeout, kwargs=parameters, **options)

        return test

    return decorate


def run_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    exit_codes: Sequence[int] | None = None,
    env: Mapping[str, str] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    fresh: bool = False,
) -> list[Any]:
    """Call ``function(*args, **kwargs)`` in ``size`` ranks; their results, by rank.

    Args:
        fresh: each rank imports TensorFlow itself, as a user's script does; otherwise
            it may be forked from a process that has.

    Raises:
        AssertionError: a rank ended otherwise than with its exit code (default: all 0);
            the output of every rank is shown.
    """
    outcomes = start_ranks(
        size, function, *args, timeout=timeout, env=env, kwargs=kwargs, fresh=fresh
    )
    expected = list(exit_codes or [0] * size)
    codes = [outcome.exit_code for outcome in outcomes]
    if codes != expected:
        everything = "\n".join(map(str, outcomes))
        raise AssertionError(
            f"{function.__qualname__}: exit codes {codes}, not {expected}\n{everything}"
        )
    return [outcome.value for outcome in outcomes]


def start_ranks(
    size: int,
    function: Callable[..., Any],
    *args: Any,
    timeout: float = 60.0,
    env: Mapping[str, str] | None = None,
    kwargs: Mapping[str, Any] | None = None,
    fresh: bool = False,
    endless: Collection[int] = (),
) -> list[Outcome]:
    """As ``run_ranks``, but returns the outcome of every rank, whatever it was.

    The ``endless`` ranks are killed when all others have ended.
    """
    function = inspect.unwrap(function)
    with _store(size) as port, tempfile.TemporaryDirectory() as folder:
        work = {
            "file": inspect.getfile(function),
            "name": function.__qualname__,
            "args": args,
            "kwargs": dict(kwargs or {}),
            "timeout": timeout,
        }
        pathlib.Path(folder, "work").write_bytes(pickle.dumps(work))
        processes = [
            _start(rank, size, port, folder, dict(env or {}), fresh)
            for rank in range(size)
        ]
        deadline = time.monotonic() + timeout + _GRACE_SECONDS
        ended = _wait(processes, deadline, endless)
        return [
            _outcome(rank, process, ended, folder)
            for rank, process in enumerate(processes)
        ]


@contextlib.contextmanager
def _store(size: int) -> Iterator[int]:
    """Horovod's own rendezvous store, as its launcher starts it; yields the port."""
    server = RendezvousServer()
    port = server.start()
    server.init(get_host_assignments(parse_hosts(f"localhost:{size}"), size))
    try:
        yield port
    finally:
        server.stop()
        server._httpd.server_close()  # stop() leaves the socket open


def _start(
    rank: int,
    size: int,
    port: int,
    folder: str,
    env: Mapping[str, str],
    fresh: bool,
) -> RankProcess:
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(_NOT_INHERITED)
    }
    cores = sorted(os.sched_getaffinity(0))
    variables = {
        "HOROVOD_HOSTNAME": "localhost",
        "HOROVOD_RANK": str(rank),
        "HOROVOD_SIZE": str(size),
        "HOROVOD_LOCAL_RANK": str(rank),
        "HOROVOD_LOCAL_SIZE": str(size),
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": str(port),
        "HOROVOD_GLOO_IFACE": "lo",
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        **_gpu_variables(),
        "PYTHONPATH": str(ROOT),
        "PYTHONUNBUFFERED": "1",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_NUM_INTEROP_THREADS": "1",
        "TF_NUM_INTRAOP_THREADS": "1",
        "TF_USE_LEGACY_KERAS": "1",
        "SMP_TEST_CORE": str(cores[rank % len(cores)]),
        "SMP_TEST_FOLDER": folder,
    }
    output = pathlib.Path(folder, f"output.{rank}")
    return rank_process.start(rank, {**inherited, **variables, **env}, output, fresh)


def _gpu_variables() -> dict[str, str]:
    """No rank sees a GPU, unless TESTS_ON_GPU is "fake" (tests/fake_device), or "real"
    as tests/gpu/with_tensorflow.sh has it.
    """
    where = os.environ.get("TESTS_ON_GPU")
    if where is None:
        return {"CUDA_VISIBLE_DEVICES": ""}
    if where == "fake":
        return {
            "CUDA_VISIBLE_DEVICES": "",  # until it is loaded
            "SMP_CONFIG": '{"share_gpu": true}',
            "SMP_TEST_FAKE_DEVICE": str(library.build()),
        }
    names = ("SMP_CONFIG", "NCCL_MULTI_RANK_GPU_ENABLE")
    return {name: os.environ[name] for name in names}


def _wait(
    processes: Sequence[RankProcess],
    deadline: float,
    endless: Collection[int],
) -> dict[int, float]:
    """When each rank ended; those that did not by the deadline are killed (absent)."""
    ended: dict[int, float] = {}
    awaited = set(range(len(processes))).difference(endless)
    try:
        while not awaited <= ended.keys() and time.monotonic() < deadline:
            for rank, process in enumerate(processes):
                if rank not in ended and process.poll() is not None:
                    ended[rank] = time.monotonic()
            time.sleep(0.01)
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    return ended


def _outcome(
    rank: int,
    process: RankProcess,
    ended: Mapping[int, float],
    folder: str,
) -> Outcome:
    output = pathlib.Path(folder, f"output.{rank}").read_text(errors="replace")
    result = pathlib.Path(folder, f"outcome.{rank}")
    value = error = None
    if result.exists():
        value, error = pickle.loads(result.read_bytes())
    return Outcome(
        rank=rank,
        exit_code=process.returncode,
        ended=ended.get(rank, time.monotonic()),
        output=output,
        value=value,
        error=error,
        timed_out=rank not in ended,
    )
