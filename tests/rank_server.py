"""A process that has imported TensorFlow and forks ranks (``tests.rank_process``).

    test process                          this process              rank
    (environment, output, folder)  --->   forks                -->  rank_main.main()
    ("started", pid)               <---   its session is begun
    ("ended", pid, exit code)      <---   reaps it

A fork is sound because this process has one thread (OpenBLAS starts none where it sees
one core), and because what it has imported is neither seeded nor in use: TensorFlow
has no context, and the kernels, UCX, Horovod and OpenMP are not loaded. A rank returns
through ``main`` to the end of the script, so it ends as any script does.
"""

import gc
import importlib
import os
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection, wait

import rank_main

# As far as tests and scripts import it in any case, and slow to import.
_IMPORTED = (
    "tensorflow",
    "tf_keras",
    "numpy",
    "pytest",
    "horovod.runner.common.util.hosts",
    "horovod.runner.http.http_server",
)


def import_all() -> None:
    """Import what ranks will need, without beginning to use it."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(cores)])
    for name in _IMPORTED:
        importlib.import_module(name)
    smp = importlib.import_module("smp_tf")
    for name in smp.__all__:
        getattr(smp, name)  # imports the module that it is in
    os.sched_setaffinity(0, cores)
    threads = os.listdir("/proc/self/task")
    assert len(threads) == 1, f"a fork would lose threads: {threads}"
    gc.collect()
    gc.freeze()  # a collection in a rank need not copy all pages


def serve(tests: Connection) -> bool:
    """Fork what is asked for until the test process closes its end; whether this is a
    rank.
    """
    running: dict[int, int] = {}  # descriptor of a process -> its number
    while True:
        for ready in wait([tests, *running]):
            if isinstance(ready, int):
                pid = running.pop(ready)
                os.close(ready)
                _, status = os.waitpid(pid, 0)
                tests.send(("ended", pid, os.waitstatus_to_exitcode(status)))
                continue
            try:
                environment, output, folder = tests.recv()
            except EOFError:
                return False
            pid = _fork()
            if pid == 0:
                tests.close()
                for descriptor in running:
                    os.close(descriptor)
                _become(environment, output, folder)
                return True
            running[os.pidfd_open(pid)] = pid
            tests.send(("started", pid))


def _fork() -> int:
    """``os.fork``, which returns when the child is the leader of a session."""
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.setsid()
    os.close(write)
    if pid != 0:
        os.read(read, 1)  # its end
    os.close(read)
    return pid


def _become(environment: Mapping[str, str], output: str, folder: str) -> None:
    """Give this process what a fresh one would have been started with."""
    descriptor = os.open(output, os.O_WRONLY | os.O_APPEND)
    for standard in (1, 2):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    os.chdir(folder)
    # The others are there, as the imports have left them.
    os.environ.update({k: v for k, v in environment.items() if k not in os.environ})
    sys.argv[:] = [rank_main.__file__]
    # Python does this for its own generator, and TensorFlow has none yet.
    sys.modules["numpy"].random.seed()


def main() -> None:
    rank_main.die_with_parent()
    import_all()
    tests = Connection(int(sys.argv[1]))
    if serve(tests):
        rank_main.main()


if __name__ == "__main__":
    main()
