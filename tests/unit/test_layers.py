"""The architecture, checked: who may import whom, and who reads the environment."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "smp_tf"

# A part may import the parts to its left; parts of one layer do not know each other.
LAYERS = [
    {"errors"},
    {"topology"},
    {"config_keys"},
    {"config", "launch"},
    {"plan"},
    {"frontend", "transport", "report"},
    {"runtime"},
    {"data_parallel", "checkpoint"},
    {"keras"},
    {"__init__", "__main__", "examples"},
]
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}

# Examples are written against the public names, as users would write them; `python
# -m smp_tf` is one more user of them.
USERS = {"__main__", "examples"}

PARTITIONING = {
    *("graph", "roles", "atoms", "cost", "problem", "segment"),
    *("orders", "stretches", "downsets", "packing", "refine", "partition"),
    *("partition_file", "profile", "weight_gradients"),
}
SCHEDULING = {"action", "schedules", "comm", "dry_run", "check"}

PURE = {"errors", "topology", "config_keys", "config", "launch", "plan"}
FOREIGN = {"tensorflow", "tf_keras", "keras", "numpy", "horovod"}


def modules():
    """Return (dotted name, path) of every module in the package."""
    return [
        (".".join(path.relative_to(ROOT).with_suffix("").parts), path)
        for path in sorted(PACKAGE.rglob("*.py"))
    ]


MODULES = modules()
IDS = [name for name, _ in MODULES]


def part_of(name):
    """Return the entry of the layer table that a module belongs to."""
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(name, path):
    """Return the dotted names that a module imports, anywhere in it.

    `from a import b` counts as a.b: b may be a module, and then it matters.
    """
    package = name.removesuffix(".__init__").split(".")
    if not name.endswith(".__init__"):
        package = package[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = [node.module] if node.module else []
            if node.level:
                base = package[: len(package) - node.level + 1] + base
            found |= {".".join([*base, alias.name]) for alias in node.names}
    return found


def ours(name, path):
    """Return the parts of smp_tf that a module imports, without its own."""
    return {
        part_of(found) if part_of(found) in LEVEL else "__init__"
        for found in imports(name, path)
        if found.split(".")[0] == "smp_tf"
    } - {part_of(name)}


def touches_environment(node):
    """Whether a syntax node names the environment: os.environ, os.getenv, ..."""
    names = {"environ", "environb", "getenv", "getenvb", "putenv", "unsetenv"}
    if isinstance(node, ast.Attribute):
        return (
            node.attr in names
            and isinstance(node.value, ast.Name)
            and node.value.id == "os"
        )
    if isinstance(node, ast.ImportFrom):
        return node.module == "os" and any(a.name in names for a in node.names)
    return False


@pytest.mark.parametrize(("name", "path"), MODULES, ids=IDS)
def test_every_module_is_in_the_table(name, path):
    assert part_of(name) in LEVEL, f"add smp_tf.{part_of(name)} to LAYERS"


@pytest.mark.parametrize(("name", "path"), MODULES, ids=IDS)
def test_imports_go_left(name, path):
    part = part_of(name)
    for other in ours(name, path):
        if part in USERS and other == "__init__":
            continue
        assert LEVEL[other] < LEVEL[part], f"{name} imports smp_tf.{other}"


@pytest.mark.parametrize(("name", "path"), MODULES, ids=IDS)
def test_decisions_need_no_tensorflow(name, path):
    if part_of(name) in PURE:
        roots = {found.split(".")[0] for found in imports(name, path)}
        assert not roots & FOREIGN


@pytest.mark.parametrize(("name", "path"), MODULES, ids=IDS)
def test_partitioning_and_scheduling_do_not_know_each_other(name, path):
    sides = (PARTITIONING, SCHEDULING), (SCHEDULING, PARTITIONING)
    for own, other in sides:
        if name.startswith("smp_tf.plan.") and name.split(".")[2] in own:
            for found in imports(name, path):
                if found.startswith("smp_tf.plan."):
                    assert found.split(".")[2] not in other, f"{name} imports {found}"


@pytest.mark.parametrize(("name", "path"), MODULES, ids=IDS)
def test_only_two_modules_read_the_environment(name, path):
    if name in ("smp_tf.config", "smp_tf.launch"):
        return
    tree = ast.parse(path.read_text())
    found = [node for node in ast.walk(tree) if touches_environment(node)]
    if name == "smp_tf.__init__":
        # It chooses Keras 2 before anything imports TensorFlow, and nothing else.
        lines = path.read_text().splitlines()
        found = [
            node
            for node in found
            if "TF_USE_LEGACY_KERAS" not in lines[node.lineno - 1]
        ]
    assert not found, f"{name} line {found[0].lineno}"


def test_pure_modules_import_without_tensorflow():
    names = [
        name.removesuffix(".__init__") for name, _ in MODULES if part_of(name) in PURE
    ]
    program = (
        "import importlib, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        f"print(sorted(set(sys.modules) & {FOREIGN!r}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(("name", "path"), MODULES, ids=IDS)
def test_files_stay_small(name, path):
    assert len(path.read_text().splitlines()) <= 600, f"split {name}"


@pytest.mark.parametrize(("name", "path"), MODULES, ids=IDS)
def test_private_tensorflow_is_imported_by_the_hooks_only(name, path):
    if not name.startswith("smp_tf.frontend.hooks."):
        private = ("tensorflow.python", "tf_keras.src", "keras.src")
        assert not [found for found in imports(name, path) if found.startswith(private)]


# The rules themselves: what they would catch.


def found_in(tmp_path, name, text):
    path = tmp_path / "module.py"
    path.write_text(text)
    return imports(name, path)


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("smp_tf.plan.comm", "import smp_tf.plan.check", {"smp_tf.plan.check"}),
        ("smp_tf.plan.comm", "from smp_tf import config", {"smp_tf.config"}),
        ("smp_tf.plan.comm", "from . import check", {"smp_tf.plan.check"}),
        ("smp_tf.plan.comm", "from ..errors import X", {"smp_tf.errors.X"}),
        ("smp_tf.plan.__init__", "from .comm import X", {"smp_tf.plan.comm.X"}),
        ("smp_tf.plan.comm", "def f():\n    import numpy", {"numpy"}),
    ],
)
def test_imports_are_found(tmp_path, name, text, found):
    assert found_in(tmp_path, name, text) == found


@pytest.mark.parametrize(
    "text", ["import os\nos.environ['A']", "import os\nos.getenv('A')",
             "from os import environ"]
)  # fmt: skip
def test_reads_of_the_environment_are_found(text):
    assert any(touches_environment(node) for node in ast.walk(ast.parse(text)))
