"""What the ranks of a job of MPI need: mpi4py, of the launcher's MPI."""

import sys
import types

import pytest

from smp_tf.errors import ConfigError
from smp_tf.transport import mpi


def test_mpi4py_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    with pytest.raises(ConfigError, match="pip install mpi4py.*horovodrun --gloo "):
        mpi.library(0, 2)


def test_mpi4py_finds_no_mpi(monkeypatch):
    class Broken(types.ModuleType):
        rc = types.SimpleNamespace(finalize=None)

        @property
        def MPI(self):
            raise RuntimeError("cannot load MPI library")

    monkeypatch.setitem(sys.modules, "mpi4py", Broken("mpi4py"))
    with pytest.raises(ConfigError, match="cannot be used: cannot load MPI library"):
        mpi.library(0, 2)


def test_mpi4py_is_of_another_mpi(monkeypatch):
    module = types.ModuleType("mpi4py")
    module.rc = types.SimpleNamespace(finalize=None)
    module.MPI = types.SimpleNamespace(
        COMM_WORLD=types.SimpleNamespace(rank=0, size=1),
        Get_library_version=lambda: "MPICH 4\nof 2024",
    )
    monkeypatch.setitem(sys.modules, "mpi4py", module)
    with pytest.raises(ConfigError, match="another MPI .*rank=1 size=2.*'MPICH 4'"):
        mpi.library(1, 2)
