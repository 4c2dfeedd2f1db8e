"""Kernels whose messages are late, for tests and benchmarks.

    path = slow_link.build()                              # once, in the test process
    run_ranks(2, body, path, env=slow_link.delay(20.0))   # milliseconds

    def body(path):
        slow_link.use(path)                               # before smp.init()

Built by setup.py's own rules from the same sources, but for one: the link that
messages go through (kernels/tests/slow_link.cc in place of kernels/link.cc).
"""

import importlib.util
import pathlib
import sys
import sysconfig
from types import ModuleType

from smp_tf.transport import ops

ROOT = pathlib.Path(__file__).resolve().parent.parent


def build() -> pathlib.Path:
    """Compile what has changed and link; the path of the library."""
    script = _setup_script()
    sources = [path for path in script.SOURCES if path.name != "link.cc"]
    script.SOURCES = [*sources, ROOT / "kernels" / "tests" / "slow_link.cc"]
    # That of `setup.py build_ext`: most objects are there already.
    platform = f"{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
    work = ROOT / "build" / f"temp.{platform}" / "kernels"
    library = ROOT / "build" / "slow_link" / "_smp_kernels.so"
    for folder in (work, library.parent):
        folder.mkdir(parents=True, exist_ok=True)
    ucx, cxx = script.find_ucx(), script.compiler()
    tensorflow = script.tensorflow_version()
    settings = [ucx, cxx, tensorflow, script.FLAGS, sys.prefix]
    script.build(library, work, ucx, cxx, tensorflow, settings)
    return library


def delay(milliseconds: float) -> dict[str, str]:
    """Environment of ranks whose messages arrive so much later."""
    return {"SMP_TEST_LINK_MS": str(milliseconds)}


def use(library: pathlib.Path) -> None:
    """Load this library instead of the installed one; before ``smp.init()``."""
    setattr(ops, "library_path", lambda: library)


def _setup_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("smp_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
