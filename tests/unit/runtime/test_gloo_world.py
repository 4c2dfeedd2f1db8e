"""The variables and the store that make a group Horovod's world under Gloo."""

import http.client
import socket
import threading

import psutil
import pytest

from smp_tf.errors import ConfigError
from smp_tf.runtime.gloo_world import (
    Slot,
    deadlines,
    interface_of,
    slots,
    store,
    variables,
)

LIMITS = (
    "HOROVOD_STALL_CHECK_TIME_SECONDS",
    "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS",
    "HOROVOD_GLOO_TIMEOUT_SECONDS",
)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in (*LIMITS, "HOROVOD_GLOO_IFACE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    ("hosts", "expected"),
    [
        ("a", [Slot(0, 1, 0, 1)]),
        ("aaa", [Slot(0, 3, 0, 1), Slot(1, 3, 0, 1), Slot(2, 3, 0, 1)]),
        ("ab", [Slot(0, 1, 0, 2), Slot(0, 1, 1, 2)]),
        ("aabb", [Slot(0, 2, 0, 2), Slot(1, 2, 0, 2),
                  Slot(0, 2, 1, 2), Slot(1, 2, 1, 2)]),
        # Uneven: the second rank of b is alone on its level, as Horovod counts.
        ("abb", [Slot(0, 1, 0, 2), Slot(0, 2, 1, 2), Slot(1, 2, 0, 1)]),
        # Not one host after the other: a spread placement over bound slots.
        ("aba", [Slot(0, 2, 0, 2), Slot(0, 1, 1, 2), Slot(1, 2, 0, 1)]),
    ],
)  # fmt: skip
def test_slots(hosts, expected):
    assert slots(hosts) == expected


@pytest.mark.parametrize("layout", ["a:1", "a:3", "a:2,b:2", "a:1,b:3,c:2"])
def test_slots_are_those_of_horovodrun(layout):
    hosts = pytest.importorskip("horovod.runner.common.util.hosts")
    size = sum(int(host.split(":")[1]) for host in layout.split(","))
    assigned = hosts.get_host_assignments(hosts.parse_hosts(layout), size)
    expected = [
        Slot(slot.local_rank, slot.local_size, slot.cross_rank, slot.cross_size)
        for slot in assigned
    ]
    assert slots([slot.hostname for slot in assigned]) == expected


def test_variables():
    assert variables(["a", "b", "b"], 2, "eth0", ("10.0.0.1", 4242)) == {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_HOSTNAME": "b",
        "HOROVOD_RANK": "2",
        "HOROVOD_SIZE": "3",
        "HOROVOD_LOCAL_RANK": "1",
        "HOROVOD_LOCAL_SIZE": "2",
        "HOROVOD_CROSS_RANK": "0",
        "HOROVOD_CROSS_SIZE": "1",
        "HOROVOD_GLOO_IFACE": "eth0",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "10.0.0.1",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": "4242",
    }
    alone = variables(["a"], 0, "lo", None)
    assert alone["HOROVOD_GLOO_RENDEZVOUS_ADDR"] is None  # unset: nobody is looked for


@pytest.mark.parametrize(
    ("timeout_s", "expected"),
    [(0.5, "1 1 1"), (6.0, "1 6 6"), (100.5, "5 101 30"), (600.0, "30 600 30")],
)
def test_deadlines(timeout_s, expected):
    assert deadlines(timeout_s) == dict(zip(LIMITS, expected.split()))


def test_the_users_deadlines_stay(monkeypatch):
    monkeypatch.setenv(LIMITS[1], "0")
    assert set(deadlines(600.0)) == {LIMITS[0], LIMITS[2]}


def test_a_group_on_one_host_uses_loopback(monkeypatch):
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "eth9")
    assert interface_of(["here", "here"], 1) == ("lo", "127.0.0.1")


def test_a_group_on_several_hosts_uses_the_interface_of_the_job(monkeypatch):
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "lo")
    assert interface_of(["here", "there"], 0) == ("lo", "127.0.0.1")
    monkeypatch.setenv("HOROVOD_GLOO_IFACE", "eth9")
    with pytest.raises(ConfigError, match="interface=eth9, .*Set HOROVOD_GLOO_IFACE"):
        interface_of(["here", "there"], 0)


def test_without_a_chosen_interface_the_route_decides():
    # To itself a host goes through loopback.
    assert interface_of(["here", "127.0.0.1"], 0) == ("lo", "127.0.0.1")
    with pytest.raises(ConfigError, match="other_host=no.such.host.invalid"):
        interface_of(["here", "no.such.host.invalid"], 0)


def test_the_store_listens_on_one_interface_and_stops():
    before = threading.active_count()
    with store("127.0.0.1") as (host, port):
        listening = [
            connection.laddr
            for connection in psutil.Process().net_connections("inet")
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port
        ]
        assert listening == [("127.0.0.1", port)]
        connection = http.client.HTTPConnection(host, port, timeout=5)
        connection.request("PUT", "/global/0", b"address")
        assert connection.getresponse().status == 200
        connection.close()
    with pytest.raises(OSError):
        socket.create_connection((host, port), timeout=1).close()
    assert threading.active_count() == before
