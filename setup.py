"""Build of the kernels: `python setup.py build_ext --inplace`, or pip.

Compiles kernels/*.cc into smp_tf/transport/_smp_kernels.so, against the installed
TensorFlow and UCX. Does nothing when nothing has changed; what counts as a change is
everything that goes into the library, so that a stale or broken one is rebuilt.

UCX is looked for in this order: SMP_UCX_HOME (a prefix with include/ and lib/), the
wheel libucx-cu12, pkg-config. Metadata is in setup.cfg.
"""

import hashlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import List, NamedTuple, NoReturn, Tuple

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
SOURCES = sorted((ROOT / "kernels").glob("*.cc"))
HEADERS = sorted((ROOT / "kernels").glob("*.h"))
JOBS = 2  # p2p_kernels.cc alone takes 1.5 GB
FLAGS = ["-std=c++17", "-O2", "-g1", "-fPIC", "-fvisibility=hidden", "-pthread"]
# UCX is linked with; NCCL's wheel is looked in at run time. For packages where they are
# now, and for those of an installation that was moved.
NCCL = "nvidia/nccl/lib"
RPATH = [f"{sysconfig.get_path('purelib')}/{NCCL}"]
RPATH += ["$ORIGIN/../../libucx/lib", f"$ORIGIN/../../{NCCL}"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unused-parameter", "-Wno-sign-compare"]


def give_up(message: str) -> NoReturn:
    """End with one line instead of a traceback."""
    sys.exit(f"smp_tf kernels: {message}")


class Ucx(NamedTuple):
    """A UCX to build against."""

    version: str
    include: str
    lib: str


def find_ucx() -> Ucx:
    """Find UCX's headers and libraries, or give up."""
    home = os.environ.get("SMP_UCX_HOME")
    wheel = importlib.util.find_spec("libucx")
    if home:
        include, lib = Path(home) / "include", Path(home) / "lib"
        if not (lib / "libucp.so").exists():
            lib = Path(home) / "lib64"
    elif wheel and wheel.origin:
        prefix = Path(wheel.origin).parent
        include, lib = prefix / "include", prefix / "lib"
    else:
        include, lib = ucx_of_pkg_config()
    header = include / "ucp" / "api" / "ucp_version.h"
    if not header.exists() or not (lib / "libucp.so").exists():
        give_up(
            f"UCX headers not found; include={include} lib={lib}; "
            "`pip install libucx-cu12`, or point SMP_UCX_HOME to an installed UCX"
        )
    found = re.findall(r"define UCP_API_M(?:AJOR|INOR) +(\d+)", header.read_text())
    return Ucx(".".join(found[:2]), str(include), str(lib))


def ucx_of_pkg_config() -> Tuple[Path, Path]:
    """Ask pkg-config for a system UCX; paths that do not exist when it has none."""

    def variable(name: str) -> Path:
        command = ["pkg-config", f"--variable={name}", "ucx"]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            return Path("/none")
        return Path(done.stdout.strip() or "/none")

    return variable("includedir"), variable("libdir")


def tensorflow_version() -> str:
    """Version of the installed TensorFlow, without the seconds of its import."""
    for name in ("tensorflow", "tensorflow-cpu"):
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    give_up("TensorFlow is not installed; `pip install tensorflow`, then build again")


def tensorflow_flags() -> Tuple[List[str], List[str]]:
    """TensorFlow's own flags to compile and to link with."""
    code = (
        "import json, tensorflow as tf; print(json.dumps("
        "[tf.sysconfig.get_compile_flags(), tf.sysconfig.get_link_flags()]))"
    )
    # In a process of its own, whose notices about CPUs and GPUs nobody needs to see.
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no message"])[-1]
        give_up(f"TensorFlow does not import: {reason}")
    compile_flags, link_flags = json.loads(done.stdout.splitlines()[-1])
    return compile_flags, link_flags


def compiler() -> str:
    """Path of g++ (or of CXX), or give up."""
    name = os.environ.get("CXX", "g++")
    path = shutil.which(name)
    if path is None:
        give_up(f"no C++ compiler; CXX={name}; on Debian: apt install g++")
    return path


def digest(*parts: object) -> str:
    """Hash of texts and of files' contents."""
    total = hashlib.sha256()
    for part in parts:
        data = part.read_bytes() if isinstance(part, Path) else str(part).encode()
        total.update(hashlib.sha256(data).digest())
    return total.hexdigest()


def succeeds(command: List[str]) -> bool:
    """Run a command for its exit code alone."""
    return subprocess.run(command, capture_output=True).returncode == 0


def run(command: List[str], log: Path) -> None:
    """Run a compiler; when it fails, give up with the first error of its log."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        return
    log.write_text(" ".join(command) + "\n" + done.stdout + done.stderr)
    lines = done.stderr.splitlines() or ["no message"]
    error = next((line for line in lines if "error" in line), lines[-1])
    raise SystemExit(f"smp_tf kernels: {error.strip()}; the whole log: {log}")


class BuildKernels(build_ext):
    """Compiles the kernels with g++; setuptools only says where the result goes."""

    def get_ext_filename(self, fullname: str) -> str:
        """No tag of a Python version: the library does not use Python."""
        return os.path.join(*fullname.split(".")) + ".so"

    def run(self) -> None:
        """Build, without the copy of setuptools, which only trusts dates."""
        for ext in self.extensions:
            self.build_extension(ext)

    def build_extension(self, ext: Extension) -> None:
        """Build when something has changed since the last time."""
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        ucx, cxx, tensorflow = find_ucx(), compiler(), tensorflow_version()
        settings = [ucx, cxx, tensorflow, FLAGS, sys.prefix]
        inputs = digest(*settings, Path(__file__), *SOURCES, *HEADERS)
        work = Path(self.build_temp).resolve() / "kernels"
        work.mkdir(parents=True, exist_ok=True)
        library, stamp = work / target.name, work / "stamp.json"
        if not is_current(stamp, inputs, library):
            build(library, work, ucx, cxx, tensorflow, settings)
            stamp.write_text(
                json.dumps({"inputs": inputs, "library": digest(library)}) + "\n"
            )
        if not target.exists() or digest(target) != digest(library):
            target.parent.mkdir(parents=True, exist_ok=True)
            # Never in place: a process may have the old one mapped.
            new = target.with_suffix(".new")
            shutil.copyfile(library, new)
            new.replace(target)


def is_current(stamp: Path, inputs: str, library: Path) -> bool:
    """Whether `library` is whole and was built from `inputs`."""
    try:
        recorded = json.loads(stamp.read_text())
        return recorded == {"inputs": inputs, "library": digest(library)}
    except (OSError, ValueError):
        return False


def build(
    library: Path, work: Path, ucx: Ucx, cxx: str, tensorflow: str, settings: List
) -> None:
    """Compile each source that has changed, then link."""
    print(f"compiling the kernels for TensorFlow {tensorflow}, UCX {ucx.version}")
    compile_flags, link_flags = tensorflow_flags()
    # -isystem: their warnings are not ours.
    system = [flag.replace("-I", "-isystem", 1) for flag in compile_flags]
    versions = [
        f'-DSMP_TENSORFLOW_VERSION="{tensorflow}"',
        f'-DSMP_UCX_VERSION="{ucx.version}"',
    ]
    flags = [*system, *FLAGS, *WARNINGS, *versions, f"-isystem{ucx.include}"]

    def compiled(source: Path) -> str:
        key = digest(*settings, flags, source, *HEADERS)[:16]
        output = work / f"{source.stem}-{key}.o"
        if not output.exists():
            for stale in work.glob(f"{source.stem}-*.o"):
                stale.unlink()
            partial = output.with_suffix(".partial")
            command = [cxx, *flags, "-c", str(source), "-o", str(partial)]
            run(command, work / f"{source.stem}.log")
            partial.replace(output)
        return str(output)

    def compile_all() -> List[str]:
        with ThreadPoolExecutor(JOBS) as pool:
            return list(pool.map(compiled, SOURCES))

    # DT_RPATH and not DT_RUNPATH: the UCX that was built against must win over another
    # one on LD_LIBRARY_PATH.
    link = [
        *(f"-Wl,-rpath,{path}" for path in (ucx.lib, *RPATH)),
        "-Wl,--disable-new-dtags",
        "-Wl,--no-undefined",
        f"-L{ucx.lib}",
        "-lucp",
        "-lucs",
        *link_flags,
    ]
    partial = library.with_suffix(".partial")
    output = [*link, "-o", str(partial)]
    if not succeeds([cxx, "-shared", "-pthread", *compile_all(), *output]):
        # An object of an earlier build may be damaged; try once from scratch.
        for stale in work.glob("*.o"):
            stale.unlink()
        command = [cxx, "-shared", "-pthread", *compile_all(), *output]
        run(command, work / "link.log")
    partial.replace(library)


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(
                "smp_tf.transport._smp_kernels",
                [str(path.relative_to(ROOT)) for path in SOURCES],
            )
        ],
        cmdclass={"build_ext": BuildKernels},
    )
