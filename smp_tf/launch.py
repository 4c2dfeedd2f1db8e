"""How this process was started, and the environment variables that say so.

    horovodrun --gloo        HOROVOD_RANK, .. and the address of its key-value store
    mpirun, horovodrun --mpi OMPI_COMM_WORLD_RANK, .. (Open MPI); PMI_RANK, .. (MPICH,
                             Intel MPI); the ranks then meet through MPI
    python script.py         none of them: a world of one

With `config`, the only module that reads environment variables, and the only one that
sets them: Horovod takes its world from there.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from smp_tf.errors import ConfigError

__all__ = [
    "Launch",
    "Threads",
    "controller",
    "environment",
    "gpus_are_hidden",
    "keep_nccl_on_host",
    "launch",
    "network_interface",
    "threads_requested",
    "user_has_set",
]


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        rank, size: this process among all of the job.
        local_rank, local_size: this process among those of its host.
        hostname: the host's name as the launcher knows it.
        store_host, store_port: the launcher's key-value store; None where it has none.
        mpi: whether MPI started the job.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    hostname: str
    store_host: str | None
    store_port: int | None
    mpi: bool = False


_HOROVOD_NUMBERS = (
    "HOROVOD_RANK",
    "HOROVOD_SIZE",
    "HOROVOD_LOCAL_RANK",
    "HOROVOD_LOCAL_SIZE",
    "HOROVOD_GLOO_RENDEZVOUS_PORT",
)
_HOROVOD_WORDS = ("HOROVOD_HOSTNAME", "HOROVOD_GLOO_RENDEZVOUS_ADDR")
# rank, size, local_rank, local_size as the process starters of Open MPI, and of MPICH
# and its relatives, set them.
_MPI_NUMBERS = (
    (
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_LOCAL_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


def launch() -> Launch:
    """Read how this process was started; alone when no launcher started it.

    Raises:
        ConfigError: the launcher's variables are incomplete, not numbers, or do not
            fit together; names the variable.
    """
    if "HOROVOD_RANK" in os.environ:
        return _by_horovodrun()
    for names in _MPI_NUMBERS:
        text = os.environ.get(names[1], "")
        if text.isdecimal() and int(text) > 1:
            return _by_mpi(names)
    return Launch(0, 1, 0, 1, "localhost", None, None)


def _by_horovodrun() -> Launch:
    remedy = "start the job with `horovodrun --gloo -np N python script.py`"
    _require((*_HOROVOD_NUMBERS, *_HOROVOD_WORDS), "HOROVOD_RANK", remedy)
    rank, size, local_rank, local_size = _ranks(_HOROVOD_NUMBERS[:4])
    hostname, store_host = (os.environ[name] for name in _HOROVOD_WORDS)
    store_port = _number_of(_HOROVOD_NUMBERS[4])
    return Launch(rank, size, local_rank, local_size, hostname, store_host, store_port)


def _by_mpi(names: tuple[str, ...]) -> Launch:
    remedy = "start the job with `mpirun` or `horovodrun`"
    _require(names, names[1], remedy)
    rank, size, local_rank, local_size = _ranks(names)
    hostname = platform.node()
    return Launch(rank, size, local_rank, local_size, hostname, None, None, mpi=True)


def _require(names: tuple[str, ...], given: str, remedy: str) -> None:
    for name in names:
        if name not in os.environ:
            raise ConfigError(
                f"{name}: not set, although {given}={os.environ[given]} is; {remedy}"
            )


def _ranks(names: tuple[str, ...]) -> tuple[int, int, int, int]:
    """rank, size, local_rank, local_size."""
    rank, size, local_rank, local_size = map(_number_of, names)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        values = ", ".join(f"{name}={os.environ[name]}" for name in names)
        raise ConfigError(f"the launcher's variables do not fit together; {values}")
    return rank, size, local_rank, local_size


def _number_of(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError(
            f"{name}: must be an integer; {name}={os.environ[name]!r:.200}"
        ) from None


@contextlib.contextmanager
def environment(values: Mapping[str, str | None]) -> Iterator[None]:
    """Set environment variables, or unset those whose value is None, for a while."""
    before = {name: os.environ.get(name) for name in values}
    _put(values)
    try:
        yield
    finally:
        _put(before)


def _put(values: Mapping[str, str | None]) -> None:
    for name, value in values.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def user_has_set(name: str) -> bool:
    """Whether an environment variable is there, also an empty one."""
    return name in os.environ


def network_interface() -> str | None:
    """The interface that the launcher or the user chose for Horovod, if any."""
    return os.environ.get("HOROVOD_GLOO_IFACE") or None


def controller() -> str | None:
    """What the launcher or the user chose for Horovod: "mpi", "gloo", or nothing."""
    return os.environ.get("HOROVOD_CONTROLLER", "").strip().lower() or None


@dataclass(frozen=True)
class Threads:
    """Thread counts that the user chose for TensorFlow; None where not chosen."""

    intra_op: int | None
    inter_op: int | None


NCCL_SHARING = "NCCL_MULTI_RANK_GPU_ENABLE"
"""NCCL's variable with which, and only then, it serves several ranks on one GPU, from
2.30 on."""


def nccl_shares_gpus() -> bool:
    """Whether NCCL lets the ranks of this job share a GPU."""
    return os.environ.get(NCCL_SHARING) == "1"


def keep_nccl_on_host() -> None:
    """Let NCCL listen on the loopback interface only; what the user has set stays.

    By itself it takes every other interface first. Its service for who looks into
    hangs (RAS, from 2.24 on) listens as well, and is not needed here. To be called
    before a communicator is made: NCCL reads its variables once.
    """
    os.environ.setdefault("NCCL_SOCKET_IFNAME", "=lo")  # =: this name, not a prefix
    os.environ.setdefault("NCCL_RAS_ENABLE", "0")


def gpus_are_hidden() -> bool:
    """Whether CUDA is to show this process no GPU at all."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def threads_requested() -> Threads:
    """Read the thread counts that TensorFlow itself takes from the environment.

    What is no positive integer counts as not chosen, as it does for TensorFlow.
    """

    def positive(name: str) -> int | None:
        text = os.environ.get(name, "").strip()
        return int(text) if text.isdecimal() and int(text) > 0 else None

    return Threads(
        intra_op=positive("TF_NUM_INTRAOP_THREADS"),
        inter_op=positive("TF_NUM_INTEROP_THREADS"),
    )
