"""Processes that take turns: what `pipeline_speedup.py` compares must not run at once.

    pipeline_speedup.py   ask("run")  -->  team: one process, or a rank on each core
                               . . .  <--  answers; all other teams are asleep meanwhile

A team is started once. Its processes connect to a socket of the benchmark and then only
wait for requests: a blocking read, no core is used. A request is the name of a method
of the player that the process serves, with its arguments.

Plain Python, because the processes of PyTorch run in an environment of their own. Here
is also what all of them compute: the sizes of the model and its batch.
"""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import connection
from pathlib import Path
from typing import Any

import numpy as np

DIM, HEADS, BLOCKS, LENGTH = 256, 4, 8, 128
EXAMPLES = 4  # in a microbatch
RANKS = 2

_START_SECONDS, _ANSWER_SECONDS, _LAST_WORDS_SECONDS = 120, 300, 5
_NOISE = 0.05  # of a core that others may take: the clocks of Linux tick in 10 ms
_PAUSE_SECONDS = 0.5
_LOG_SHOWN = 4000  # characters of a failed team's output


def batch(num_microbatches: int) -> tuple[np.ndarray, np.ndarray]:
    """Inputs and targets, the same in every process."""
    generator = np.random.default_rng(num_microbatches)
    shape = (2, num_microbatches * EXAMPLES, LENGTH, DIM)
    inputs, targets = generator.standard_normal(shape, np.float32)
    return inputs, targets


# --- in a process of a team -----------------------------------------------------------


def pin(rank: int) -> None:
    """Keep this process on one core; before a framework counts cores."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})


def serve(address: str, rank: int, player: Any) -> None:
    """Answer requests until the benchmark stops asking."""
    with connection.Client(address, "AF_UNIX") as line:
        line.send(rank)
        while True:
            try:
                name, arguments = line.recv()
            except EOFError:
                return
            line.send(getattr(player, name)(*arguments))


def timed(step: Callable[[], object]) -> tuple[float, float, float]:
    """Start and end on the clock of the host, and seconds of a core in between."""
    gc.disable()
    start, core = time.monotonic(), time.process_time()
    step()
    end, core = time.monotonic(), time.process_time() - core
    gc.enable()
    return start, end, core


# --- in the benchmark -----------------------------------------------------------------


class Team:
    """Some processes that were started together.

    Args:
        commands: to start them; their last argument, the address, is added here.
        size: how many will connect.
        folder: of sockets and logs.
    """

    def __init__(
        self,
        name: str,
        commands: Sequence[Sequence[str]],
        size: int,
        folder: Path,
    ) -> None:
        self.name, self._log = name, folder / f"{name}.log"
        address = str(folder / f"{name}.socket")
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        self._lines: list[Any] = []
        with socket.socket(socket.AF_UNIX) as door, self._log.open("w") as log:
            door.bind(address)
            door.listen()
            door.settimeout(0.2)
            self._processes = [
                subprocess.Popen(
                    [*command, address],
                    env={**quiet, **os.environ},
                    cwd=Path(__file__).resolve().parent.parent,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
                for command in commands
            ]
            self._lines = [line for _, line in sorted(self._arrivals(door, size))]

    def ask(self, name: str, *arguments: Any, only: int | None = None) -> list[Any]:
        """The answers of all processes, or of one, in the order of their ranks."""
        lines = self._lines if only is None else [self._lines[only]]
        for line in lines:
            line.send((name, arguments))
        answers: dict[Any, Any] = {}
        while len(answers) < len(lines):
            waiting = [line for line in lines if line not in answers]
            ready = connection.wait(waiting, _ANSWER_SECONDS)
            if not ready:
                self._fail(f"no answer to {name!r} in {_ANSWER_SECONDS} s")
            for line in ready:
                try:
                    answers[line] = line.recv()
                except (EOFError, OSError):
                    self._fail(f"ended early, at {name!r}")
        return [answers[line] for line in lines]

    def close(self) -> None:
        """Let its processes end; they do when nobody can ask them any more."""
        for line in self._lines:
            line.close()
        for process in self._processes:
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def _arrivals(self, door: socket.socket, size: int) -> Iterator[tuple[int, Any]]:
        deadline = time.monotonic() + _START_SECONDS
        while size:
            try:
                line = connection.Connection(door.accept()[0].detach())
            except TimeoutError:
                if any(process.poll() for process in self._processes):
                    self._fail("did not start")
                if time.monotonic() > deadline:
                    self._fail(f"did not start in {_START_SECONDS} s")
                continue
            size -= 1
            yield line.recv(), line

    def _fail(self, how: str) -> None:
        time.sleep(_LAST_WORDS_SECONDS)  # the others of the team have something to say
        for process in self._processes:
            process.terminate()
        log = self._log.read_text(errors="replace")[-_LOG_SHOWN:]
        sys.exit(f"{self.name}: {how}\n{log}")


class Referee:
    """Lets a turn be repeated when something else ran on this machine meanwhile.

    Attributes:
        turns, disturbed: how many were taken, and of them those that had to be taken as
            they were, because ``patience`` (seconds spent on repeating) was over.
    """

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self.turns = self.disturbed = 0

    def watch(self, turn: Callable[[], list[Any]]) -> list[Any]:
        """What a turn gives: of each process start, end and seconds on its core."""
        while True:
            others, start = -_busy_seconds(), time.monotonic()
            runs = turn()
            others += _busy_seconds() - sum(run[2] for run in runs)
            spent = time.monotonic() - start
            is_disturbed = others > _NOISE * spent
            if is_disturbed and self._patience > 0:
                time.sleep(_PAUSE_SECONDS)
                self._patience -= spent + _PAUSE_SECONDS
                continue
            self.turns += 1
            self.disturbed += is_disturbed
            return runs


def _busy_seconds() -> float:
    """Of all cores, since the machine was started; stolen ones are not idle either."""
    first = Path("/proc/stat").read_text().split("\n", 1)[0]
    user, nice, system, _, _, irq, softirq, steal = map(int, first.split()[1:9])
    ticks = user + nice + system + irq + softirq + steal
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def closing(teams: list[Team]) -> Iterator[None]:
    """Close those that are in the list by the end, whatever happens."""
    try:
        yield
    finally:
        for team in teams:
            team.close()
