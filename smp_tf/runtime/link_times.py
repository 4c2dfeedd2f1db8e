"""Measure the links between the ranks of a pipeline: messages sent to and fro.

    ping   send -----> receive
    pong   receive <----- send      half of it is one way; the fastest of a few counts

Ranks meet in pairs, as in a tournament, and so do not disturb each other's wires.
"""

import time

import numpy as np

from smp_tf.plan.link import Link, Links, rounds_of_pairs
from smp_tf.runtime import session

REPEATS = 5
"""The first opens the connection, so it is seldom the fastest."""

LONG_BYTES = 1 << 20
"""Of the message that shows the bandwidth: a usual activation."""

_SHORTEST = 1e-7  # seconds; more bytes cannot take less


def measure_links() -> Links:
    """What it takes between any two ranks of this pp_group; the same on all of them.

    Every rank of the group must call it. Messages are measured as objects between two
    Python processes, some 0.1 ms more than the tensors of a step need.

    Raises:
        TransportError: a rank failed, or did not come within timeout_s.
    """
    mine, count = session.pp_rank(), session.pp_size()
    found: dict[tuple[int, int], Link] = {}
    for pairs in rounds_of_pairs(count):
        for low, high in pairs:
            if mine == low:
                found[low, high] = _ping(high)
            elif mine == high:
                _pong(low)
    links: dict[tuple[int, int], Link] = {}
    for each in session.allgather(found, session.PP_GROUP):
        for (low, high), link in each.items():
            links[low, high] = links[high, low] = link
    return links


def _ping(peer: int) -> Link:
    short, long = (
        min(_to_and_fro(payload, peer) for _ in range(REPEATS)) / 2
        for payload in _payloads()
    )
    return Link(short, LONG_BYTES / max(long - short, _SHORTEST))


def _to_and_fro(payload: np.ndarray, peer: int) -> float:
    start = time.perf_counter()
    session.send(payload, peer, session.PP_RANK)
    session.recv_from(peer, session.PP_RANK)
    return time.perf_counter() - start


def _pong(peer: int) -> None:
    for payload in _payloads():
        for _ in range(REPEATS):
            session.recv_from(peer, session.PP_RANK)
            session.send(payload, peer, session.PP_RANK)


def _payloads() -> tuple[np.ndarray, np.ndarray]:
    return np.zeros(1, np.uint8), np.zeros(LONG_BYTES, np.uint8)
