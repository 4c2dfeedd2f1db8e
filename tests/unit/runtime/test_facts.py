"""What is found on this machine, and what is told where something is broken."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensorflow as tf

from smp_tf.errors import TransportError
from smp_tf.report.info import Part
from smp_tf.runtime import facts
from smp_tf.transport import nccl, ops
from tests.fake_gpus import FakeGpus


def gathered() -> dict[str, Part]:
    return {part.name: part for part in facts.gather()}


def test_this_machine():
    parts = gathered()
    assert list(parts)[:6] == [*facts._PARTS][:6]
    versions = dict(parts["TensorFlow"].facts)
    assert versions["version"] == tf.__version__
    kernels = dict(parts["kernels"].facts)
    assert kernels["path"] == str(ops.library_path())
    assert kernels["built for TensorFlow"] == tf.__version__
    assert kernels["send"] == kernels["receive"] == "CPU, GPU"
    ucx = dict(parts["UCX"].facts)
    assert Path(str(ucx["path"])).name.startswith("libucp.so")
    assert str(ucx["version"])[0].isdigit()
    assert dict(parts["Horovod"].facts)["gloo"] is True
    assert "none has started this process" in parts["launcher"].why_not


def test_every_part_may_break_by_itself(monkeypatch):
    def broken() -> Part:
        raise OSError("some library\n is broken")

    for name in facts._PARTS:
        with monkeypatch.context() as patch:
            patch.setitem(facts._PARTS, name, broken)
            parts = gathered()
        assert parts[name] == Part(name, (), "OSError: some library is broken")
        assert len(parts) >= len(facts._PARTS)
        assert not parts["Python" if name != "Python" else "smp_tf"].why_not


def test_kernels_that_do_not_load(monkeypatch):
    def refuse(*_: object) -> None:
        raise TransportError("the kernels do not load: libucp.so.0 is not there")

    monkeypatch.setattr(ops, "load", refuse)
    monkeypatch.setattr(nccl, "_rows", refuse)
    parts = gathered()
    for name in ("kernels", "UCX", "CUDA driver", "GPU", "NCCL"):
        assert parts[name].why_not.endswith("libucp.so.0 is not there")
    # What can be read without loading it is told.
    assert dict(parts["kernels"].facts)["built for TensorFlow"] == tf.__version__
    assert not parts["TensorFlow"].why_not


def test_what_is_not_installed(monkeypatch):
    def version(name: str) -> str:
        raise facts.importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(facts.importlib.metadata, "version", version)
    assert gathered()["Horovod"].why_not == "it is not installed"


def test_fake_gpus():
    with FakeGpus(("GPU-a", "GPU-b")).installed() as gpus:
        parts = gathered()
        assert dict(parts["GPU 1"].facts)["uuid"] == "GPU-b"
        assert not parts["GPU 1"].why_not
        assert dict(parts["CUDA driver"].facts)["version"] == "12.4"
        assert parts["NCCL"].why_not == "it is not there"
        gpus.physical.clear()
        parts = gathered()
        assert "TensorFlow does not see it" in parts["GPU 1"].why_not
        assert parts["NCCL"].why_not == "TensorFlow sees no GPU and it is not there"
    with FakeGpus((), has_driver=False).installed():
        parts = gathered()
        assert parts["GPU"].why_not == "there is none (it is not there)"
        assert parts["NCCL"].why_not.startswith("no GPU (it is not there)")


@pytest.mark.parametrize("name", ["libucp.so", "libuct.so"])
def test_libraries_that_are_loaded(name, tmp_path):
    maps = tmp_path / "maps"
    maps.write_text(
        "7f00-7f01 r-xp 00000000 08:01 1234   [heap]\n"
        "7f00-7f01 r-xp 00000000 08:01 1234   /my libs/libucp.so.0.0.0\n"
    )
    if name == "libucp.so":
        assert facts.loaded_library(name, maps) == "/my libs/libucp.so.0.0.0"
    else:
        with pytest.raises(FileNotFoundError, match="no libuct.so is loaded"):
            facts.loaded_library(name, maps)


def test_the_command(tmp_path):
    """As a user has it; a launcher that is not whole is told as well."""
    root = Path(__file__).resolve().parents[3]
    environment = {**os.environ, "PYTHONPATH": str(root), "HOROVOD_RANK": "0"}
    result = subprocess.run(
        [sys.executable, "-m", "smp_tf", "info", "--json"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    parts = json.loads(result.stdout)["parts"]
    assert parts["TensorFlow"]["version"] == tf.__version__
    assert parts["launcher"]["why_not"].startswith("HOROVOD_SIZE: not set")
