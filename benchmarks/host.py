"""What every benchmark prints first: the machine and the versions."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path

_DISTRIBUTIONS = ("tensorflow", "tf-keras", "horovod", "libucx-cu12", "numpy")


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def describe() -> str:
    """Two lines: cpu, cores of the machine and their load; versions."""
    load = os.getloadavg()[0]
    versions = " ".join(
        f"{name}={importlib.metadata.version(name)}" for name in _DISTRIBUTIONS
    )
    return (
        f"host: cpu={_cpu()} cores={os.cpu_count()} load={load:.2f} "
        f"linux={platform.release()}\n"
        f"versions: python={platform.python_version()} {versions}"
    )
