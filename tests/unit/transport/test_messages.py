"""Messages over a pretended engine: ranks are threads, channels are queues."""

import collections
import concurrent.futures
import itertools
import threading
import time
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from smp_tf.errors import TransportError
from smp_tf.topology import Topology
from smp_tf.transport.encoding import (
    PACKET_BYTES,
    Operation,
    buffer_lengths,
    decode,
    encode,
    read_packet,
)
from smp_tf.transport.messages import CommGroup, Messages, RankType

JOB, OTHER_JOB = "ab" * 16, "cd" * 16
WORLD, WORLD_RANK = CommGroup.WORLD, RankType.WORLD_RANK


class Network:
    """Connects the engines of all ranks; (source, destination, channel) -> queue."""

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.sent: dict[tuple[int, int, int], collections.deque[Any]]
        self.sent = collections.defaultdict(collections.deque)
        self.asked: dict[tuple[int, int, int], collections.deque[Any]]
        self.asked = collections.defaultdict(collections.deque)
        self.done: set[int] = set()
        self.numbers = itertools.count(1)

    def match(self, route: tuple[int, int, int]) -> None:
        while self.sent[route] and self.asked[route]:
            send, data = self.sent[route].popleft()
            receive, memory = self.asked[route].popleft()
            assert data.size == memory.size, f"sizes differ: {data.size} {memory.size}"
            memory[:] = data
            self.done |= {send, receive}
            self.changed.notify_all()


class PretendedEngine:
    """The part of ``Engine`` that ``Messages`` uses. Every send is synchronous."""

    def __init__(self, network: Network, rank: int) -> None:
        self.network, self.rank = network, rank

    def post_send(
        self, peer: int, channel: int, memory: Any, *, synchronous: bool
    ) -> int:
        route = (self.rank, peer, channel)
        with self.network.changed:
            number = next(self.network.numbers)
            self.network.sent[route].append((number, memory))
            self.network.match(route)
        return number

    def post_recv(self, peer: int, channel: int, memory: Any) -> int:
        route = (peer, self.rank, channel)
        with self.network.changed:
            number = next(self.network.numbers)
            self.network.asked[route].append((number, memory))
            self.network.match(route)
        return number

    def wait(self, request: int, seconds: float) -> bool:
        done = self.network.done
        with self.network.changed:
            return self.network.changed.wait_for(lambda: request in done, seconds)

    def cancel(self, request: int) -> None:
        with self.network.changed:
            self.network.done.add(request)


def run(
    size: int,
    call: Callable[[Messages, int], Any],
    topology: Topology | None = None,
    timeout_s: float = 10.0,
    jobs: Any = None,
) -> list[Any]:
    """Results of ``call(messages, rank)``, or the exceptions, by rank."""
    network = Network()
    topology = topology or Topology(size=size, pp_size=size)

    def one(rank: int) -> Any:
        engine: Any = PretendedEngine(network, rank)
        job = jobs[rank] if jobs else JOB
        return call(Messages(engine, topology, rank, job, timeout_s), rank)

    with concurrent.futures.ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
        return [future.exception() or future.result() for future in futures]


def round_trip(obj: Any) -> Any:
    """The object after encode and decode, and the sizes of its parts."""
    parts = encode(obj, Operation.OBJECT, JOB)
    assert parts[0].size == PACKET_BYTES
    copies = [part.copy() for part in parts]
    packet = read_packet(copies[0], Operation.OBJECT, JOB)
    body, buffers = packet.body, copies[1:]
    if body is None:
        body, *buffers = buffers
        assert body.size == packet.body_bytes
    assert list(buffer_lengths(body, packet.num_buffers)) == [b.size for b in buffers]
    return decode(body, buffers), [part.size for part in parts]


@pytest.mark.parametrize(
    "obj", [None, 7, "text", b"x" * 5000, {"a": [1, (2, 3)]}, list(range(9000))]
)
def test_plain_objects_survive(obj: Any) -> None:
    assert round_trip(obj)[0] == obj


BIG = np.arange(6000, dtype=np.float32)


@pytest.mark.parametrize(
    "array",
    [
        BIG,
        BIG.reshape(60, 100).T,
        BIG[::2],
        BIG.astype(ml_dtypes.bfloat16),
        BIG.astype(ml_dtypes.bfloat16).reshape(60, 100).T,
        BIG.astype(">i4"),
        BIG.astype("U7"),
        BIG.astype([("a", "f4"), ("b", "i8")]),
        BIG.astype("M8[s]"),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}-{array.strides}",
)
def test_large_arrays_travel_outside_the_pickle(array: Any) -> None:
    result, sizes = round_trip(array)
    assert result.dtype == array.dtype and result.shape == array.shape
    assert (result == array).all()
    assert result.flags.writeable
    assert sizes == [PACKET_BYTES, array.nbytes]


@pytest.mark.parametrize(
    "array",
    [
        np.float64(3),
        np.array(2.5),
        np.array(1, ml_dtypes.bfloat16),
        np.zeros((0, 3)),
        np.zeros((0, 3), ml_dtypes.bfloat16),
        np.array(["a", None, 3], object),
        np.ma.masked_array([1, 2], [True, False]),
        np.ones(20)[::3],
    ],
    ids=repr,
)
def test_small_and_odd_arrays_fit_one_packet(array: Any) -> None:
    result, sizes = round_trip(array)
    assert type(result) is type(array)
    np.testing.assert_array_equal(result, array)
    assert sizes == [PACKET_BYTES]


def test_arrays_are_not_copied_by_the_sender() -> None:
    parts = encode({"weights": BIG, "step": 3}, Operation.OBJECT, JOB)
    assert np.shares_memory(parts[1], BIG)


def test_a_foreign_packet_is_refused_before_it_is_unpickled() -> None:
    packet = encode("anything", Operation.OBJECT, OTHER_JOB)[0]
    with pytest.raises(TransportError, match="id of this job"):
        read_packet(packet, Operation.OBJECT, JOB)


def test_messages_keep_their_order() -> None:
    objects = [0, "one", BIG, list(range(5000)), None]

    def call(messages: Messages, rank: int) -> Any:
        if rank == 0:
            for obj in objects:
                messages.send(obj, 1, WORLD_RANK)
            return None
        return [messages.recv_from(0, WORLD_RANK) for _ in objects]

    _, received = run(2, call)
    np.testing.assert_array_equal(received.pop(2), BIG)
    assert received == [0, "one", list(range(5000)), None]


def test_broadcast_is_received_by_recv_from() -> None:
    def call(messages: Messages, rank: int) -> Any:
        if rank == 2:
            return messages.broadcast({"lr": 0.1}, WORLD)
        return messages.recv_from(2, WORLD_RANK)

    assert run(4, call) == [{"lr": 0.1}, {"lr": 0.1}, None, {"lr": 0.1}]


def test_allgather_is_ordered_by_group_rank() -> None:
    topology = Topology(size=8, pp_size=2, tp_size=2, placement="PTD")

    def call(messages: Messages, rank: int) -> Any:
        results = {g.name: messages.allgather(rank, g) for g in CommGroup}
        for group in CommGroup:
            messages.barrier(group)
        return results

    for rank, results in enumerate(run(8, call, topology)):
        assert results == {
            "WORLD": list(range(8)),
            "MP_GROUP": list(topology.mp_group(rank)),
            "DP_GROUP": list(topology.dp_group(rank)),
            "PP_GROUP": list(topology.pp_group(rank)),
            "TP_GROUP": list(topology.tp_group(rank)),
            "RDP_GROUP": list(topology.rdp_group(rank)),
        }


def test_rank_types_count_within_the_callers_group() -> None:
    topology = Topology(size=4, pp_size=2)  # mp_groups 01 23, dp_groups 02 13

    def call(messages: Messages, rank: int) -> Any:
        if rank < 2:
            messages.send(f"from {rank}", 1, RankType.DP_RANK)
            return None
        return messages.recv_from(0, RankType.RDP_RANK)

    assert run(4, call, topology)[2:] == ["from 0", "from 1"]


def test_barrier_waits_for_the_last() -> None:
    arrived = []

    def call(messages: Messages, rank: int) -> Any:
        time.sleep(0.1 * rank)
        arrived.append(rank)
        messages.barrier()
        return len(arrived)

    assert run(3, call) == [3, 3, 3]


def test_bad_ranks_and_groups_raise_before_anything_is_sent() -> None:
    topology = Topology(size=4, pp_size=2)
    network = Network()
    engine: Any = PretendedEngine(network, 1)
    messages = Messages(engine, topology, 1, JOB, 1.0)
    bad: list[tuple[Callable[..., Any], tuple[Any, ...], str]] = [
        (messages.send, (0, 4, WORLD_RANK), "must be 0..3 for WORLD_RANK"),
        (messages.send, (0, 2, RankType.PP_RANK), "must be 0..1 for PP_RANK"),
        (messages.send, (0, -1, WORLD_RANK), "dest_rank=-1"),
        (messages.send, (0, 1.5, WORLD_RANK), "dest_rank=1.5"),
        (messages.send, (0, 1, WORLD_RANK), "the caller itself"),
        (messages.recv_from, (1, RankType.MP_RANK), "the caller itself"),
        (messages.recv_from, (0, "PP_RANK"), "rank_type='PP_RANK'"),
        (messages.recv_from, (0, WORLD), "rank_type=<CommGroup.WORLD"),
        (messages.broadcast, (0, WORLD_RANK), "`group` must be one of"),
        (messages.allgather, (0, None), "group=None"),
        (messages.barrier, ([0, 1],), "group=\\[0, 1\\]"),
    ]
    for call, arguments, text in bad:
        with pytest.raises(ValueError, match=text):
            call(*arguments)
    assert not network.sent and not network.asked


def test_an_object_that_cannot_be_pickled_breaks_nothing() -> None:
    def call(messages: Messages, rank: int) -> Any:
        with pytest.raises((TypeError, AttributeError)):
            messages.allgather(threading.Lock(), WORLD)
        return messages.allgather(rank, WORLD)

    assert run(2, call) == [[0, 1], [0, 1]]


def test_the_deadline_names_who_is_absent_and_ends_the_session() -> None:
    def call(messages: Messages, rank: int) -> Any:
        if rank == 1:
            return None
        with pytest.raises(TransportError) as caught:
            messages.barrier()
        with pytest.raises(TransportError) as later:
            messages.allgather(1, CommGroup.MP_GROUP)
        return str(caught.value), str(later.value)

    results = run(3, call, timeout_s=0.3)
    for rank in (0, 2):
        first, later = results[rank]
        assert "rank 1 did not answer within timeout_s=0.3" in first
        assert f"rank {rank} in barrier(WORLD)" in first
        assert first in later


def test_a_send_without_a_receive_meets_the_deadline() -> None:
    def call(messages: Messages, rank: int) -> None:
        if rank == 0:
            messages.send(1, 1, RankType.PP_RANK)

    error, _ = run(2, call, timeout_s=0.3)
    assert isinstance(error, TransportError)
    assert "rank 0 in send(.., 1, PP_RANK)" in str(error)


def test_different_calls_are_told_apart() -> None:
    def call(messages: Messages, rank: int) -> Any:
        return messages.barrier() if rank else messages.allgather(1, WORLD)

    errors = run(2, call)
    assert "barrier arrived where allgather was called" in str(errors[0])
    assert "allgather arrived where barrier was called" in str(errors[1])


def test_a_message_of_another_job_is_refused() -> None:
    def call(messages: Messages, rank: int) -> Any:
        return messages.allgather(rank, WORLD)

    for error in run(2, call, jobs=[JOB, OTHER_JOB]):
        assert isinstance(error, TransportError) and "id of this job" in str(error)


def test_threads_do_not_mix_their_messages() -> None:
    def call(messages: Messages, rank: int) -> Any:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            if rank == 0:
                work = [BIG + number for number in range(12)]
                list(pool.map(lambda obj: messages.send(obj, 1, WORLD_RANK), work))
                return None
            receive = lambda _: messages.recv_from(0, WORLD_RANK)[0]  # noqa: E731
            return sorted(pool.map(receive, range(12)))

    assert run(2, call)[1] == list(range(12))


def test_a_world_of_one_needs_no_engine() -> None:
    messages = Messages(None, Topology(size=1, pp_size=1), 0, "", 1.0)
    messages.barrier()
    messages.broadcast(1, CommGroup.PP_GROUP)
    assert messages.allgather("x", WORLD) == ["x"]
