"""What the machine has for messages between GPUs: CUDA's driver, NCCL, the GPUs.

The kernel library looks for them when it is first asked; it needs none of them to load.
"""

import ctypes
from functools import lru_cache
from typing import NamedTuple

from smp_tf.transport import ops

_TEXT_BYTES = 64 * 1024


class NcclLibrary(NamedTuple):
    """The libnccl.so.2 that was found.

    Attributes:
        version: "2.30.3"; "" if none was loaded.
        path: file; "" if none was loaded.
        why_not: why it cannot be used; "" if it can.
    """

    version: str
    path: str
    why_not: str


class Driver(NamedTuple):
    """CUDA's driver; the fields are those of ``NcclLibrary``, the version is CUDA's."""

    version: str
    path: str
    why_not: str


class Gpu(NamedTuple):
    """A GPU that this process sees.

    Attributes:
        ordinal: as CUDA counts the visible ones.
        uuid: "GPU-..." as nvidia-smi prints it.
        bus: PCI bus id.
        bytes_total: of its memory.
    """

    ordinal: int
    name: str
    uuid: str
    bus: str
    bytes_total: int


def found() -> NcclLibrary:
    """The NCCL of this process.

    Raises:
        TransportError: the kernel library does not load.
    """
    (row,) = (cells for kind, *cells in _rows() if kind == "nccl")
    number, path, why_not = row
    return NcclLibrary(_nccl_version(int(number)), path, why_not)


def driver() -> Driver:
    """CUDA's driver.

    Raises:
        TransportError: the kernel library does not load.
    """
    (row,) = (cells for kind, *cells in _rows() if kind == "cuda")
    number, path, why_not = row
    major, minor = divmod(int(number), 1000)
    return Driver(f"{major}.{minor // 10}" if major else "", path, why_not)


def gpus() -> tuple[Gpu, ...]:
    """The visible GPUs, in CUDA's order; none without a driver.

    Raises:
        TransportError: the kernel library does not load.
    """
    return tuple(
        Gpu(int(ordinal), name, uuid, bus, int(size))
        for kind, ordinal, name, uuid, bus, size in (
            row for row in _rows() if row[0] == "gpu"
        )
    )


@lru_cache(maxsize=None)
def _rows() -> tuple[tuple[str, ...], ...]:
    """See smp_gpu_info in kernels/gpu_api.cc; what is there does not change."""
    text = ctypes.create_string_buffer(_TEXT_BYTES)
    ops.load().smp_gpu_info(text, ctypes.c_size_t(len(text)))
    lines = text.value.decode(errors="replace").splitlines()
    return tuple(tuple(line.split("\t")) for line in lines)


def _nccl_version(number: int) -> str:
    """Of NCCL_VERSION_CODE, whose form has changed with 2.9."""
    if not number:
        return ""
    thousand = 10000 if number >= 10000 else 1000
    major, rest = divmod(number, thousand)
    return f"{major}.{rest // 100}.{rest % 100}"
