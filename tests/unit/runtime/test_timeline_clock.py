"""Offsets between clocks, with clocks and messages that are simulated."""

import queue
import random
import threading

import pytest

from smp_tf.runtime.timeline_clock import (
    EXCHANGES,
    Clock,
    Exchange,
    align,
    clock_name,
    offset_of,
)

MS = 1_000_000


def exchange(now, offset, there, work, back):
    """Times of one exchange that begins at ``now`` on this rank's clock."""
    received_there = now + there + offset
    sent_there = received_there + work
    return Exchange(now, received_there, sent_there, sent_there - offset + back)


@pytest.mark.parametrize("offset", [0, 7, -3_000_000_000, 10**13])
def test_the_truth_lies_within_the_bound(offset):
    rng = random.Random(offset)
    for _ in range(200):
        exchanges = [
            exchange(
                rng.randrange(10**12),
                offset,
                there=rng.randrange(20_000, 5 * MS),
                work=rng.randrange(5 * MS),
                back=rng.randrange(20_000, 5 * MS),
            )
            for _ in range(10)
        ]
        clock = offset_of(exchanges)
        assert abs(clock.offset_ns - offset) <= clock.error_ns
        fastest = min(
            e.received - e.sent - (e.sent_there - e.received_there) for e in exchanges
        )
        assert clock.error_ns <= fastest // 2 + 1


def test_equal_delays_give_the_offset_exactly():
    clock = offset_of([exchange(5, 1_000, 40, 9, 40), exchange(500, 1_000, 90, 9, 90)])
    assert clock == Clock(1_000, 40)


def test_a_little_drift_is_no_disaster():
    clock = offset_of([exchange(0, 100, 3, 0, 3), exchange(50, 110, 3, 0, 3)])
    assert abs(clock.offset_ns - 105) <= 5


def test_this_process_has_one_clock():
    assert clock_name() == clock_name() != ""


class Link:
    """Messages of a rank whose clock runs ``offset`` behind that of rank 0."""

    def __init__(self, queues, rank):
        self.queues, self.rank = queues, rank

    def send(self, obj, dest_rank, rank_type):
        self.queues[self.rank, dest_rank].put(obj)

    def recv_from(self, src_rank, rank_type):
        return self.queues[src_rank, self.rank].get(timeout=10)


def test_only_ranks_of_other_clocks_ask():
    names = ["here", "here", "there", "there"]
    offsets = [0, 0, 10**9, -(10**9)]
    ends = [(a, b) for a in range(4) for b in range(4)]
    queues = {end: queue.Queue() for end in ends}
    asked = {end: 0 for end in ends}
    found = {}

    def run(rank):
        import time

        link = Link(queues, rank)
        found[rank] = align(
            link, rank, names, lambda: time.monotonic_ns() - offsets[rank]
        )

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert found[0] == found[1] == Clock(0, 0)
    for rank in (2, 3):
        assert abs(found[rank].offset_ns - offsets[rank]) <= found[rank].error_ns
        assert 0 < found[rank].error_ns < 10**8
    assert all(each.empty() for each in queues.values())
    assert EXCHANGES >= 5 and asked
