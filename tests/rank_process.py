"""The process of a rank: forked by a server where that is the same, or a fresh one.

A fresh process spends seconds in importing TensorFlow. ``rank_server`` has done that,
in the environment of the first rank; a rank whose environment differs in anything that
may be read at import is a fresh process all the same.

Ranks with neighbouring numbers come from different servers. So they differ in hashes
and in addresses, as the processes of a job do: what depends on the order of a set would
not be found otherwise.
"""

import atexit
import contextlib
import multiprocessing
import os
import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from typing import Protocol

_FOLDER = pathlib.Path(__file__).resolve().parent
_SERVERS = 2
# How the names begin of what is read when it is used, and not at import. UCX comes with
# the kernels, which no server loads, nor does one load an OpenMP; scikit-learn sets
# variables of that one in the test process.
_READ_LATER = (
    "HOROVOD_",
    "KMP_",
    "PYTEST_",
    "SMP_",
    "SM_HP_",
    "TF_NUM_INTEROP_THREADS",
    "TF_NUM_INTRAOP_THREADS",
    "UCX_",
)


class RankProcess(Protocol):
    """What there is of ``subprocess.Popen``, which is one."""

    pid: int
    returncode: int | None

    def poll(self) -> int | None: ...

    def wait(self) -> int: ...


def start(
    rank: int, environment: Mapping[str, str], output: pathlib.Path, is_fresh: bool
) -> RankProcess:
    """Start ``rank_main`` in a session of its own.

    Args:
        environment: all of it.
        output: the file for what it prints.
        is_fresh: a fresh process even where a fork would do.

    Raises:
        RuntimeError: the server has ended; the text has what it printed.
    """
    output.touch()
    server = None if is_fresh else _server_of(rank, environment)
    if server is not None:
        return server.fork(environment, output)
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, str(_FOLDER / "rank_main.py")],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


class _Server:
    """The test process's end of a ``rank_server``.

    Attributes:
        imported: the environment in which it has imported.
        ended: pid of a rank -> exit code.
    """

    def __init__(self, imported: Mapping[str, str]) -> None:
        self.imported = imported
        self.ended: dict[int, int] = {}
        self._started: list[int] = []
        self._output = tempfile.TemporaryFile()
        self._ranks, theirs = multiprocessing.Pipe()
        with theirs:
            descriptor = theirs.fileno()
            self._process = subprocess.Popen(
                [sys.executable, str(_FOLDER / "rank_server.py"), str(descriptor)],
                env=imported,
                stdin=subprocess.DEVNULL,
                stdout=self._output,
                stderr=subprocess.STDOUT,
                pass_fds=[descriptor],
                start_new_session=True,
            )

    def fork(
        self, environment: Mapping[str, str], output: pathlib.Path
    ) -> "_ForkedRank":
        with contextlib.suppress(BrokenPipeError):  # receive() says why
            self._ranks.send((dict(environment), str(output), os.getcwd()))
        while not self._started:
            self.receive()
        return _ForkedRank(self._started.pop(), self)

    def receive(self) -> None:
        """Wait for a message: ``("started", pid)`` or ``("ended", pid, exit code)``."""
        try:
            event, pid, *exit_code = self._ranks.recv()
        except (EOFError, ConnectionError) as error:
            raise RuntimeError(self._last_words()) from error
        if event == "started":
            self.ended.pop(pid, None)  # of an earlier rank: Linux gives numbers again
            self._started.append(pid)
        else:
            (self.ended[pid],) = exit_code

    def receive_all(self) -> None:
        """Take the messages that are there."""
        while self._ranks.poll():
            self.receive()

    def close(self) -> None:
        """End the server, and with it the ranks that are left."""
        self._process.kill()
        self._process.wait()
        self._ranks.close()
        self._output.close()

    def is_running(self) -> bool:
        return self._process.poll() is None

    def _last_words(self) -> str:
        code = self._process.wait()
        self._output.seek(0)
        output = self._output.read().decode(errors="replace")
        return f"tests/rank_server.py has ended: exit code {code}\n{output}"


class _ForkedRank:
    """A rank whose parent is a server."""

    def __init__(self, pid: int, server: _Server) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._server = server

    def poll(self) -> int | None:
        self._server.receive_all()
        self.returncode = self._server.ended.get(self.pid)
        return self.returncode

    def wait(self) -> int:
        while self.pid not in self._server.ended:
            self._server.receive()
        self.returncode = self._server.ended[self.pid]
        return self.returncode


_servers: list[_Server] = []


def _server_of(rank: int, environment: Mapping[str, str]) -> _Server | None:
    """The server for this rank; None if what it has imported might differ."""
    imported = {
        name: value
        for name, value in environment.items()
        if not name.startswith(_READ_LATER)
    }
    if not all(server.is_running() for server in _servers):
        _close()
    if not _servers:  # all at once: they import at the same time
        _servers.extend(_Server(imported) for _ in range(_SERVERS))
    server = _servers[rank % _SERVERS]
    return server if server.imported == imported else None


@atexit.register
def _close() -> None:
    while _servers:
        _servers.pop().close()
