"""How a process learns which rank it is, from each launcher."""

import os
import platform

import pytest

from smp_tf.errors import ConfigError
from smp_tf.launch import (
    Launch,
    Threads,
    controller,
    environment,
    gpus_are_hidden,
    keep_nccl_on_host,
    launch,
    network_interface,
    threads_requested,
    user_has_set,
)

HOROVOD = {
    "HOROVOD_RANK": "3",
    "HOROVOD_SIZE": "4",
    "HOROVOD_LOCAL_RANK": "1",
    "HOROVOD_LOCAL_SIZE": "2",
    "HOROVOD_HOSTNAME": "beta",
    "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.7",
    "HOROVOD_GLOO_RENDEZVOUS_PORT": "41234",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "3",
    "OMPI_COMM_WORLD_SIZE": "4",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
MPICH = {
    "PMI_RANK": "3",
    "PMI_SIZE": "4",
    "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "2",
}
LAUNCHERS = [HOROVOD, OPEN_MPI, MPICH]
THREADS = ("TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in (*HOROVOD, *OPEN_MPI, *MPICH, *THREADS, "HOROVOD_GLOO_IFACE"):
        monkeypatch.delenv(name, raising=False)


def set_all(monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)


def test_no_launcher():
    assert launch() == Launch(0, 1, 0, 1, "localhost", None, None)


def test_horovodrun(monkeypatch):
    set_all(monkeypatch, HOROVOD)
    assert launch() == Launch(3, 4, 1, 2, "beta", "10.0.0.7", 41234)


@pytest.mark.parametrize("variables", [OPEN_MPI, MPICH], ids=["open_mpi", "mpich"])
def test_mpi(monkeypatch, variables):
    set_all(monkeypatch, variables)
    assert launch() == Launch(3, 4, 1, 2, platform.node(), None, None, mpi=True)
    size = list(variables)[1]
    monkeypatch.setenv(size, "1")  # a world of one needs no MPI
    assert launch() == Launch(0, 1, 0, 1, "localhost", None, None)


def test_horovodrun_inside_a_job_of_mpi(monkeypatch):
    set_all(monkeypatch, {**OPEN_MPI, **HOROVOD})
    assert not launch().mpi


@pytest.mark.parametrize(
    ("variables", "missing"),
    [(HOROVOD, name) for name in HOROVOD if name != "HOROVOD_RANK"]
    + [(OPEN_MPI, name) for name in OPEN_MPI if name != "OMPI_COMM_WORLD_SIZE"]
    + [(MPICH, name) for name in MPICH if name != "PMI_SIZE"],
)
def test_incomplete_launch(monkeypatch, variables, missing):
    set_all(monkeypatch, variables)
    monkeypatch.delenv(missing)
    with pytest.raises(ConfigError, match=f"^{missing}: not set, although .*start "):
        launch()


@pytest.mark.parametrize("place", [0, 3])
@pytest.mark.parametrize("variables", LAUNCHERS)
def test_nonsense_from_a_launcher(monkeypatch, variables, place):
    set_all(monkeypatch, variables)
    name = list(variables)[place]
    monkeypatch.setenv(name, "four")
    with pytest.raises(ConfigError, match=f"{name}: must be an integer; {name}='four'"):
        launch()
    monkeypatch.setenv(name, "5")
    with pytest.raises(ConfigError, match=f"do not fit together; .*{name}=5"):
        launch()


def test_variables_are_set_for_a_while(monkeypatch):
    set_all(monkeypatch, {"HOROVOD_RANK": "3", "HOROVOD_SIZE": "4"})
    monkeypatch.delenv("HOROVOD_CROSS_RANK", raising=False)
    lent = {"HOROVOD_RANK": "1", "HOROVOD_SIZE": None, "HOROVOD_CROSS_RANK": "0"}
    with pytest.raises(KeyError), environment(lent):
        assert os.environ["HOROVOD_RANK"] == "1"
        assert os.environ["HOROVOD_CROSS_RANK"] == "0"
        assert not user_has_set("HOROVOD_SIZE")
        raise KeyError
    assert os.environ["HOROVOD_RANK"] == "3"
    assert os.environ["HOROVOD_SIZE"] == "4"
    assert not user_has_set("HOROVOD_CROSS_RANK")


def test_network_interface(monkeypatch):
    assert network_interface() is None
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "")
    assert network_interface() is None
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "eth1")
    assert network_interface() == "eth1"


def test_controller(monkeypatch):
    monkeypatch.delenv("HOROVOD_CONTROLLER", raising=False)
    assert controller() is None
    monkeypatch.setenv("HOROVOD_CONTROLLER", "GLOO")
    assert controller() == "gloo"


@pytest.mark.parametrize(
    ("value", "hidden"), [(None, False), ("", True), ("-1", True), ("0,1", False)]
)
def test_hidden_gpus(value, hidden, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if value is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", value)
    assert gpus_are_hidden() is hidden


def test_nccl_listens_on_loopback_unless_the_user_says_otherwise(monkeypatch):
    set_all(monkeypatch, {"NCCL_SOCKET_IFNAME": "x", "NCCL_RAS_ENABLE": "x"})
    keep_nccl_on_host()
    assert os.environ["NCCL_SOCKET_IFNAME"] == os.environ["NCCL_RAS_ENABLE"] == "x"
    monkeypatch.delenv("NCCL_SOCKET_IFNAME")
    monkeypatch.delenv("NCCL_RAS_ENABLE")
    keep_nccl_on_host()
    assert os.environ["NCCL_SOCKET_IFNAME"] == "=lo"
    assert os.environ["NCCL_RAS_ENABLE"] == "0"


def test_thread_counts(monkeypatch):
    assert threads_requested() == Threads(None, None)
    monkeypatch.setenv("TF_NUM_INTRAOP_THREADS", "3")
    monkeypatch.setenv("TF_NUM_INTEROP_THREADS", "many")
    assert threads_requested() == Threads(intra_op=3, inter_op=None)
