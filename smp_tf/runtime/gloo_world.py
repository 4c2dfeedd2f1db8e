"""What makes a group of ranks Horovod's world under Gloo: variables and a store.

Horovod reads environment variables at ``hvd.init()``: the numbers of this rank, and
where the key-value store is in which its ranks find each other. Every group has a store
of its own, Horovod's, started by the group's first rank.
"""

import contextlib
import dataclasses
import math
import socket
import threading
from collections.abc import Iterator, Sequence
from typing import Any

from smp_tf.errors import ConfigError
from smp_tf.launch import network_interface, user_has_set

_GLOO_SECONDS = 30.0  # Horovod's default, for one exchange between threads of its own
_WARN_SECONDS = 30.0  # as long as the transport waits before it names whom it awaits
_POLL_SECONDS = 0.1  # between two looks of the store's thread whether to stop


@dataclasses.dataclass(frozen=True)
class Slot:
    """Where one rank of a group is among the hosts, as Horovod counts.

    Attributes:
        local_rank, local_size: among the ranks of the group on its host.
        cross_rank, cross_size: among the hosts that have such a local_rank.
    """

    local_rank: int
    local_size: int
    cross_rank: int
    cross_size: int


def slots(hosts: Sequence[str]) -> list[Slot]:
    """The slot of each rank of a group, given their hosts in the order of the group."""
    ranks_of: dict[str, list[int]] = {}
    for rank, host in enumerate(hosts):
        ranks_of.setdefault(host, []).append(rank)
    found = []
    for rank, host in enumerate(hosts):
        own = ranks_of[host]
        local_rank = own.index(rank)
        level = [name for name, ranks in ranks_of.items() if len(ranks) > local_rank]
        found.append(Slot(local_rank, len(own), level.index(host), len(level)))
    return found


def variables(
    hosts: Sequence[str], place: int, interface: str, store: tuple[str, int] | None
) -> dict[str, str | None]:
    """The world of the rank at ``place`` of a group; None for a variable to unset.

    Args:
        hosts: of the ranks of the group.
        interface: network interface of this host to the others.
        store: host and port of the group's store; None in a world of one.
    """
    host, port = store or (None, None)
    numbers = dataclasses.asdict(slots(hosts)[place])
    return {
        "HOROVOD_CONTROLLER": "gloo",
        "HOROVOD_CPU_OPERATIONS": "gloo",
        "HOROVOD_HOSTNAME": hosts[place],
        "HOROVOD_RANK": str(place),
        "HOROVOD_SIZE": str(len(hosts)),
        **{f"HOROVOD_{name.upper()}": str(value) for name, value in numbers.items()},
        "HOROVOD_GLOO_IFACE": interface,
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": host,
        "HOROVOD_GLOO_RENDEZVOUS_PORT": None if port is None else str(port),
    }


def deadlines(timeout_s: float) -> dict[str, str | None]:
    """Horovod's time limits: a wait for a rank that never comes ends, too.

    Left to itself Horovod only warns of it, after a minute. It looks every CHECK
    seconds, and twice before it gives up an operation that it knows from before, so a
    wait fails after timeout_s and at most 3 CHECK seconds. What the user has set stays.
    """
    check = max(1, int(min(_WARN_SECONDS, timeout_s / 20)))
    limits = {
        "HOROVOD_STALL_CHECK_TIME_SECONDS": check,
        "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS": max(check, math.ceil(timeout_s)),
        "HOROVOD_GLOO_TIMEOUT_SECONDS": math.ceil(min(_GLOO_SECONDS, timeout_s)),
    }
    return {
        name: str(limit) for name, limit in limits.items() if not user_has_set(name)
    }


def interface_of(hosts: Sequence[str], place: int) -> tuple[str, str]:
    """This host's network interface to the others of a group, and its IPv4 address.

    Loopback where the group has one host; else the interface that the launcher has
    found or the user has set, and else the one with the route to another host.

    Raises:
        ConfigError: there is no such interface, or it has no address.
    """
    import psutil  # Horovod needs it, too

    other = next((host for host in hosts if host != hosts[place]), None)
    if other is None:
        return "lo", "127.0.0.1"
    addresses = {
        name: entry.address
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET
    }
    chosen = network_interface()
    if chosen is None:
        route = _address_towards(other)
        chosen = next((name for name, own in addresses.items() if own == route), None)
    if chosen is None or chosen not in addresses:
        raise ConfigError(
            "Horovod needs a network interface with an IPv4 address and a route to the "
            f"other hosts; host={hosts[place]}, other_host={other}, "
            f"interface={chosen}, interfaces={addresses}. Set HOROVOD_GLOO_IFACE to "
            f"one of them."
        )
    return chosen, addresses[chosen]


def _address_towards(host: str) -> str | None:
    """The address that this host would send from; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((host, 9))
        except OSError:
            return None
        return str(probe.getsockname()[0])


@contextlib.contextmanager
def store(address: str) -> Iterator[tuple[str, int]]:
    """Horovod's key-value store, on one interface only; yields its host and port."""
    # Not its RendezvousServer: that listens on every interface.
    from horovod.runner.http.http_server import RendezvousHandler, RendezvousHTTPServer

    server: Any = RendezvousHTTPServer((address, 0), RendezvousHandler, 0)
    thread = threading.Thread(
        target=server.serve_forever, args=(_POLL_SECONDS,), name="smp_tf", daemon=True
    )
    thread.start()
    try:
        yield address, server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
