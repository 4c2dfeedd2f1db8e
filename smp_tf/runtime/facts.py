"""What there is on this machine, gathered for ``report.info``.

Each part is looked for by itself: one that is missing or broken says so, and the others
are told all the same. Nothing is written or changed, but in a job of several ranks they
meet, as ``smp.init`` has them meet, to find out what they talk by.
"""

import ctypes
import importlib
import importlib.metadata
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from smp_tf.errors import SmpError
from smp_tf.launch import gpus_are_hidden, launch
from smp_tf.report.info import Info, Pair, Part, RankInfo, Value
from smp_tf.runtime import session
from smp_tf.runtime.pinning import Pinned

_MEET_SECONDS = 120.0  # for the slowest rank to import TensorFlow
_REASON_CHARACTERS = 400
_OPERATIONS = {"send": "SmpSendPost", "receive": "SmpRecvWait"}
_HOROVOD = ("gloo", "mpi", "nccl", "cuda", "rocm", "ccl", "ddl")


def gather() -> tuple[Part, ...]:
    """All parts, as this process finds them. Does not raise."""
    return tuple(part for name, look in _PARTS.items() for part in _told(name, look))


def gather_job() -> Info | None:
    """The parts, and of a job of several ranks who talks by what; None if this is not
    rank 0, which tells. Does not raise."""
    parts = gather()
    try:
        started = launch()
    except SmpError:  # told as a part
        return Info(parts)
    if started.size == 1:
        return Info(parts)
    try:
        info = _of_all_ranks(parts)
    except Exception as error:
        info = Info(parts, why_no_job=_reason(error))
    finally:
        session.shutdown()
    return info if started.rank == 0 else None


def _of_all_ranks(parts: tuple[Part, ...]) -> Info:
    session.init({"timeout_s": _MEET_SECONDS})
    mine = session.current("info")
    told = RankInfo(mine.rank, mine.launch.hostname, _gpu_text(mine.gpu), parts)
    ranks = session.allgather(told, session.WORLD)
    pairs = session.allgather(_pairs_of(mine), session.WORLD)
    return Info(parts, tuple(ranks), tuple(pair for of_one in pairs for pair in of_one))


def _gpu_text(gpu: Pinned) -> str:
    if gpu.ordinal is None:
        return ""
    return " ".join(filter(None, (str(gpu.ordinal), gpu.name, gpu.uuid)))


def _pairs_of(mine: Any) -> list[Pair]:
    """The pairs of which this is the lower rank."""
    pairs = []
    for peer in range(mine.rank + 1, mine.launch.size):
        data, _, monitor = mine.engine.describe(peer).partition("; ")
        pairs.append(
            Pair(
                (mine.rank, peer),
                messages=data.removeprefix("data: "),
                watch=monitor.removeprefix("monitor: "),
                gpus=mine.gpu_links.why_not_nccl(peer) or "NCCL",
            )
        )
    return pairs


# The parts. What raises is told as the reason why the part is not used.


def _told(name: str, look: Callable[[], Part | list[Part]]) -> list[Part]:
    try:
        found = look()
    except Exception as error:
        return [Part(name, (), _reason(error))]
    return found if isinstance(found, list) else [found]


def _reason(error: BaseException) -> str:
    if isinstance(error, importlib.metadata.PackageNotFoundError):
        return "it is not installed"
    text = re.sub(r"\s+", " ", str(error))[:_REASON_CHARACTERS]
    return text if isinstance(error, SmpError) else f"{type(error).__name__}: {text}"


def _smp_tf() -> Part:
    package = importlib.import_module("smp_tf")
    folder = Path(str(package.__file__)).parent
    return Part("smp_tf", (("version", package.__version__), ("path", str(folder))))


def _python() -> Part:
    facts = (("version", platform.python_version()), ("path", sys.executable))
    return Part("Python", facts)


def _tensorflow() -> Part:
    import tensorflow as tf

    build = tf.sysconfig.get_build_info()
    facts: list[tuple[str, Value]] = [("version", tf.__version__)]
    if build.get("is_cuda_build"):
        facts.append(("built for CUDA", str(build.get("cuda_version", "?"))))
        facts.append(("cuDNN", str(build.get("cudnn_version", "?"))))
    else:
        facts.append(("built for CUDA", False))
    facts.append(("GPUs", len(tf.config.list_physical_devices("GPU"))))
    return Part("TensorFlow", tuple(facts))


def _keras() -> Part:
    version = importlib.metadata.version("tf_keras")
    import tensorflow as tf

    in_use = str(tf.keras.Model.__module__).partition(".")[0]
    why_not = "" if in_use == "tf_keras" else f"tf.keras is {in_use}"
    return Part("tf-keras", (("version", version),), why_not)


def _kernels() -> Part:
    from smp_tf.frontend.hooks import kernels
    from smp_tf.transport import ops

    path = ops.library_path()
    facts: list[tuple[str, Value]] = [("path", str(path))]
    try:
        if path.exists():
            facts.append(("built for TensorFlow", ops.built_for(path) or "?"))
        ops.load()
        for name, operation in _OPERATIONS.items():
            facts.append((name, ", ".join(kernels.devices_of(operation)) or "none"))
    except Exception as error:
        return Part("kernels", tuple(facts), _reason(error))
    return Part("kernels", tuple(facts))


def _ucx() -> Part:
    from smp_tf.transport import ops

    ops.load()  # brings UCX with it
    path = loaded_library("libucp.so")
    get_version = ctypes.CDLL(path).ucp_get_version_string
    get_version.restype = ctypes.c_char_p
    return Part("UCX", (("version", get_version().decode()), ("path", path)))


def loaded_library(name: str, maps: Path = Path("/proc/self/maps")) -> str:
    """The path of a library that this process has loaded.

    Raises:
        FileNotFoundError: it has loaded none of that name.
    """
    for line in maps.read_text(errors="replace").splitlines():
        _, slash, rest = line.partition("/")  # addresses, flags, .. hold none
        if rest.rpartition("/")[2].startswith(name):
            return slash + rest
    raise FileNotFoundError(f"no {name} is loaded")


def _driver() -> Part:
    from smp_tf.transport import nccl

    driver = nccl.driver()
    return Part("CUDA driver", _version_and_path(driver), driver.why_not)


def _gpus() -> list[Part]:
    import tensorflow as tf

    from smp_tf.transport import nccl

    seen = {gpu.name for gpu in tf.config.list_physical_devices("GPU")}
    parts = [
        Part(
            f"GPU {gpu.ordinal}",
            (
                ("name", gpu.name),
                ("memory_bytes", gpu.bytes_total),
                ("uuid", gpu.uuid),
                ("bus", gpu.bus),
            ),
            "" if f"/physical_device:GPU:{gpu.ordinal}" in seen else _why_not_seen(),
        )
        for gpu in nccl.gpus()
    ]
    return parts or [Part("GPU", (), f"there is none ({_why_no_gpu()})")]


def _why_not_seen() -> str:
    import tensorflow as tf

    build = tf.sysconfig.get_build_info()
    if not build.get("is_cuda_build"):
        return "this TensorFlow is built without CUDA"
    return (
        "TensorFlow does not see it; its log says which library of CUDA is missing "
        '(`pip install "tensorflow[and-cuda]"`), or whether the GPU is too old'
    )


def _why_no_gpu() -> str:
    from smp_tf.transport import nccl

    driver = nccl.driver()
    if driver.path and gpus_are_hidden():
        return "CUDA_VISIBLE_DEVICES hides all"
    return driver.why_not or "CUDA's driver knows of none"


def _nccl() -> Part:
    import tensorflow as tf

    from smp_tf.transport import nccl

    library = nccl.found()
    reasons = []
    if not nccl.gpus():
        reasons.append(f"no GPU ({_why_no_gpu()})")
    elif not tf.config.list_physical_devices("GPU"):
        reasons.append("TensorFlow sees no GPU")
    if library.why_not:
        reasons.append(library.why_not)
    return Part("NCCL", _version_and_path(library), " and ".join(reasons))


def _version_and_path(library: Any) -> tuple[tuple[str, Value], ...]:
    facts = (("version", library.version), ("path", library.path))
    return tuple(fact for fact in facts if fact[1])


def _horovod() -> Part:
    version = importlib.metadata.version("horovod")
    try:
        hvd = importlib.import_module("horovod.tensorflow")
        features = tuple(
            (name, bool(getattr(hvd, f"{name}_built")()))
            for name in _HOROVOD
            if hasattr(hvd, f"{name}_built")
        )
    except Exception as error:
        return Part("Horovod", (("version", version),), _reason(error))
    return Part("Horovod", (("version", version), *features))


def _mpi4py() -> Part:
    if not launch().mpi:
        return Part("mpi4py", (), "MPI did not start this process")
    return Part("mpi4py", (("version", importlib.metadata.version("mpi4py")),))


def _launcher() -> Part:
    started = launch()
    facts: list[tuple[str, Value]] = [("ranks", started.size)]
    if started.mpi:
        return Part("launcher", (("name", "MPI"), *facts))
    if started.store_host is not None:
        store = f"{started.store_host}:{started.store_port}"
        return Part("launcher", (("name", "Gloo"), *facts, ("store", store)))
    why_not = "none has started this process; `horovodrun --gloo -np N` starts N ranks"
    return Part("launcher", (), why_not)


_PARTS: dict[str, Callable[[], Part | list[Part]]] = {
    "smp_tf": _smp_tf,
    "Python": _python,
    "TensorFlow": _tensorflow,
    "tf-keras": _keras,
    "kernels": _kernels,
    "UCX": _ucx,
    "CUDA driver": _driver,
    "GPU": _gpus,
    "NCCL": _nccl,
    "Horovod": _horovod,
    "mpi4py": _mpi4py,
    "launcher": _launcher,
}
