"""What benchmarks share: the machine and the versions, and a launch of ranks."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
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


def launch_ranks(
    size: int, script: str, *arguments: str, env: Mapping[str, str] = {}
) -> str:
    """What `script --rank arguments` prints on `size` ranks; ends with it if it fails.

    Args:
        env: added to this process's.
    """
    command = [str(Path(sys.executable).parent / "horovodrun"), "--gloo"]
    command += ["-np", str(size)]
    command += [sys.executable, str(Path(script).resolve()), "--rank", *arguments]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command,
        env={**quiet, **os.environ, **env},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        timeout=600,
    )
    if done.returncode:
        sys.exit(f"exit code {done.returncode}\n{done.stdout}")
    return done.stdout


def pin_rank() -> None:
    """One core for each rank; to be called before TensorFlow counts cores."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(os.environ["HOROVOD_LOCAL_RANK"]) % len(cores)]
    os.sched_setaffinity(0, {core})
