"""Who sends to whom by NCCL, and in which order the connections are made."""

import itertools
import threading

import pytest

from smp_tf.plan.graph import TensorSpec
from smp_tf.plan.program import Channel, Instruction, Operation, Program
from smp_tf.runtime.gpu_links import Card, GpuLinks, open_links, why_not_nccl
from smp_tf.runtime.pinning import Pinned
from smp_tf.transport import nccl
from smp_tf.transport.messages import CommGroup

PLAIN = Card(version="2.30.3", gpu="GPU-a")


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        (Card("2.30.3", "GPU-b"), ""),
        (Card(), "one of them has no GPU"),
        (Card("", "GPU-b", "no NCCL: libnccl.so.2 is not there"), "libnccl.so.2"),
        (Card("2.27.1", "GPU-b"), "different versions of NCCL: 2.27.1 and 2.30.3"),
        (Card("2.30.3", "GPU-a"), "the same GPU"),
        (Card("2.30.3", "GPU-a", shares=True), "the same GPU"),  # one of them only
    ],
)
def test_both_ends_say_the_same(other, expected):
    one, two = why_not_nccl(PLAIN, other), why_not_nccl(other, PLAIN)
    assert one == two
    assert (one == "") == (expected == "") and expected in one


def test_a_gpu_is_shared_where_both_may():
    sharing = Card("2.30.3", "GPU-a", shares=True)
    assert why_not_nccl(sharing, sharing) == ""


def test_where_operations_stand():
    nowhere = GpuLinks()
    assert nowhere.device_of("float32", 1) == ""
    links = GpuLinks(rank=0, cards=[PLAIN, Card("2.30.3", "GPU-b"), Card()])
    assert links.device_of("float32", 1) == links.device_of("bool", 1) == "GPU:0"
    for dtype in ("int32", "string"):  # in host memory, also on a GPU
        assert links.device_of(dtype, 1) == "CPU:0"
    assert links.device_of("float32", 2) == "CPU:0"  # it has no GPU, or another NCCL


class Wire:
    """Stands in for the messages and the connections of all ranks: a connection is made
    when both ends are there, as NCCL's are; whoever waits for ever fails the test."""

    def __init__(self) -> None:
        self.ids = itertools.count()
        self.meetings: dict[object, threading.Barrier] = {}
        self.lock = threading.Lock()
        self.sent: dict[tuple[int, int], bytes] = {}
        self.made: list[tuple[int, int, bytes]] = []

    def meet(self, what: object) -> None:
        with self.lock:
            meeting = self.meetings.setdefault(what, threading.Barrier(2))
        meeting.wait(timeout=20)


class End:
    """The engine and the messages of one rank."""

    def __init__(self, wire: Wire, rank: int) -> None:
        self.wire, self.rank = wire, rank

    def nccl_id(self) -> bytes:
        return b"%d" % next(self.wire.ids)

    def send(self, value: bytes, peer: int, rank_type: object) -> None:
        self.wire.sent[self.rank, peer] = value
        self.wire.meet(("message", self.rank, peer))

    def recv_from(self, peer: int, rank_type: object) -> bytes:
        self.wire.meet(("message", peer, self.rank))
        return self.wire.sent[peer, self.rank]

    def connect_gpu(self, peer: int, sends: bool, nccl_id: bytes) -> None:
        pair = (self.rank, peer) if sends else (peer, self.rank)
        self.wire.meet(("connection", *pair))
        with self.wire.lock:
            self.wire.made.append((*pair, nccl_id))


def program_of(rank: int, pairs: set[tuple[int, int]], dtype: str = "float32"):
    """Uses the pairs that the rank is part of, in an order of its own."""
    spec = TensorSpec(dtype, (4,))
    instructions = []
    mine = [pair for pair in sorted(pairs, reverse=rank % 2 == 0) if rank in pair]
    for source, target in mine:
        operation = Operation.SEND if source == rank else Operation.POST
        peer = target if source == rank else source
        channel = Channel(len(instructions), "x:0", peer, spec)
        instructions.append(Instruction(operation, 0, 0, channel))
    return Program(rank, 1, tuple(instructions))


def connect_all(size: int, pairs: set[tuple[int, int]], dtype: str = "float32"):
    wire, errors = Wire(), []

    def run(rank: int) -> None:
        end = End(wire, rank)
        cards = [Card("2.30.3", f"GPU-{each}") for each in range(size)]
        links = GpuLinks(end, end, rank, cards)  # type: ignore[arg-type]
        try:
            for _ in range(2):  # the second time nothing is left to do
                links.connect(program_of(rank, pairs, dtype), range(size))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=[rank]) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not errors
    return wire.made


@pytest.mark.parametrize("size", [2, 3, 5])
def test_all_ranks_connect_whatever_the_order_of_their_programs(size):
    pairs = set(itertools.permutations(range(size), 2))
    made = connect_all(size, pairs)
    assert len(made) == 2 * len(pairs)
    ends = {}
    for source, target, nccl_id in made:
        ends.setdefault((source, target), []).append(nccl_id)
    assert set(ends) == pairs
    assert all(one == other for one, other in ends.values())
    assert len({one for one, _ in ends.values()}) == len(pairs)


def test_what_goes_over_the_host_needs_no_connection():
    assert connect_all(2, {(0, 1), (1, 0)}, dtype="int32") == []
    none = GpuLinks()
    none.connect(program_of(0, {(0, 1)}), range(2))
    assert none.group_for_sums(CommGroup.WORLD) is None


class Group:
    """The engine and the messages of rank 1 in a world of three, and a group of two."""

    def __init__(self) -> None:
        self.connected: list[object] = []

    def members(self, group: CommGroup) -> list[int]:
        return [1, 2] if group is CommGroup.DP_GROUP else [0, 1, 2]

    def allgather(self, value: bytes, group: CommGroup) -> list[bytes]:
        return [value] * 2

    def nccl_id(self) -> bytes:
        return b"id"

    def connect_group(self, ranks: list[int], nccl_id: bytes) -> int:
        self.connected.append((ranks, nccl_id))
        return 7


def test_a_group_adds_up_by_nccl_only_if_all_of_it_can():
    end = Group()
    cards = [Card(), PLAIN, Card("2.30.3", "GPU-b")]
    links = GpuLinks(end, end, 1, cards)  # type: ignore[arg-type]
    assert links.group_for_sums(CommGroup.WORLD) is None  # rank 0 has no GPU
    assert [links.group_for_sums(CommGroup.DP_GROUP) for _ in range(2)] == [7, 7]
    assert end.connected == [([1, 2], b"id")]


class Pair:
    """The engine and the messages of rank 0 of two that are alike."""

    def open_gpu(self, ordinal: int) -> None:
        pass

    def allgather(self, value: object, group: CommGroup) -> list[object]:
        return [value] * 2


def links_of_a_pair(monkeypatch, version: str, one_host: bool = False) -> GpuLinks:
    """Both on one GPU, whose owner wants it to be shared."""
    monkeypatch.setenv("NCCL_MULTI_RANK_GPU_ENABLE", "1")
    found = nccl.NcclLibrary(version, "libnccl.so.2", "")
    monkeypatch.setattr(nccl, "found", lambda: found)
    return open_links(
        Pair(), Pair(), 0, [Pinned(0, "GPU-a")] * 2, one_host  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("version", "shares"), [("2.29.7", False), ("2.30.3", True), ("3.0.0", True)]
)
def test_the_variable_alone_does_not_share_a_gpu(version, shares, monkeypatch):
    links = links_of_a_pair(monkeypatch, version)
    assert (links.why_not_nccl(1) == "") == shares


@pytest.mark.parametrize("one_host", [True, False])
def test_nccl_stays_on_the_host_if_all_ranks_do(one_host, monkeypatch):
    kept = []
    monkeypatch.setattr(
        "smp_tf.runtime.gpu_links.keep_nccl_on_host", lambda: kept.append(True)
    )
    links_of_a_pair(monkeypatch, "2.30.3", one_host)
    assert kept == [True] * one_host
