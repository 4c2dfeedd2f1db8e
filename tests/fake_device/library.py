"""A GPU for TensorFlow that is not there: built by the tests, loaded by their ranks.

``device.cc`` and ``kernels.cc`` beside this file are the device, over the fakes of CUDA
and NCCL in ``kernels/tests``. So everything of smp_tf runs as on a machine with GPUs:
pinning, placement, the kernels for GPUs, their transport, sums. What computes are the
CPU's kernels; what is asynchronous on a GPU, and how fast one is, is not seen.

    TESTS_ON_GPU=fake python -m pytest tests/..     any test with it, on every rank

Some tests are about what there is not then: cores for each rank, timelines.
"""

import ctypes
import os
import pathlib
import subprocess
import sys
from functools import lru_cache

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = sorted(pathlib.Path(__file__).parent.glob("*.cc"))
ENGINE = [ROOT / "kernels" / name for name in ("gpu_device.cc", "gpu_libraries.cc")]
LIBRARY = "libfake_device.so"
VARIABLES = {
    "CUDA_VISIBLE_DEVICES": "0",
    "NCCL_MULTI_RANK_GPU_ENABLE": "1",  # all ranks share the one that there is
    "UCX_MODULES": "^cuda",  # a part of UCX that the fake of CUDA cannot serve
}
OPTIONS = {
    # They rewrite for cuDNN, and what they make has no kernel for CPUs.
    "layout_optimizer": False,
    "remapping": False,
    "implementation_selector": False,
}


class Counts(ctypes.Structure):
    """Of kernels/tests/fake_nccl.h."""

    _fields_ = [
        (name, ctypes.c_int)
        for name in (
            "communicators",
            "aborts",
            "operations",
            "launches",
            "mismatches",
            "mistakes",
        )
    ]


@lru_cache(maxsize=None)
def build() -> pathlib.Path:
    """The folder of the libraries; compiles what has changed, half a minute if all has.

    Raises:
        subprocess.CalledProcessError: a compiler failed; its output is on stderr.
    """
    sys.path.insert(0, str(ROOT))
    import setup

    compile_flags, link_flags = setup.tensorflow_flags()
    headers = [*ROOT.glob("kernels/*.h"), *ROOT.glob("kernels/tests/*.h")]
    headers += SOURCES[0].parent.glob("*.h")
    used = [*SOURCES, *ENGINE, *sorted(headers), pathlib.Path(__file__)]
    name = setup.digest(setup.tensorflow_version(), compile_flags, *used)[:16]
    folder = ROOT / "build" / "fake_device"
    makefile = ROOT / "kernels/tests/Makefile"
    subprocess.run(["make", "-s", "-f", makefile, f"OUT={folder}", "fakes"], check=True)
    library = folder / name / LIBRARY
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        partial = library.with_suffix(".partial")
        command = [setup.compiler(), "-shared", *setup.FLAGS, f"-I{ROOT}"]
        command += ["-Wno-deprecated-declarations"]  # names of older TensorFlows
        command += [flag.replace("-I", "-isystem", 1) for flag in compile_flags]
        command += [*map(str, SOURCES), *map(str, ENGINE), "-o", str(partial)]
        command += [f"-L{folder}", "-l:libfake_cuda.so", f"-Wl,-rpath,{folder}", "-ldl"]
        command += [*link_flags, "-l:libtensorflow_cc.so.2"]
        subprocess.run(command, check=True)
        partial.replace(library)
    return library.parent


def why_not() -> str:
    """Why the fakes cannot take the place of CUDA's libraries; "" if they can."""
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ""
    return "CUDA's driver is there, which TensorFlow loads first: see tests/gpu/run.sh"


def load(folder: pathlib.Path) -> None:
    """Give this process the GPU; TensorFlow must not have been used.

    Args:
        folder: of ``build``.
    """
    os.environ.update(VARIABLES)
    import tensorflow as tf

    from smp_tf.runtime import pinning

    for name in ("libfake_cuda.so", "libfake_nccl.so"):
        ctypes.CDLL(str(folder.parent / name), mode=ctypes.RTLD_GLOBAL)
    tf.load_library(str(folder / LIBRARY))
    (folder / "nvidia0").touch()
    pinning._DEVICES = folder  # in place of /dev
    tf.config.optimizer.set_experimental_options(OPTIONS)
    # Keras would compile the updates of optimizers, for CUDA, where there is a GPU.
    from tf_keras.src.optimizers import optimizer

    optimizer.tf_utils.can_jit_compile = lambda *_, **__: False


def counts() -> Counts:
    """What this process has asked of the fake NCCL so far."""
    found = Counts()
    ctypes.CDLL("libnccl.so.2").fake_nccl_counts(ctypes.byref(found))
    return found
