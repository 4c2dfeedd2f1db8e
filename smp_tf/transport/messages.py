"""Messages between ranks: any picklable object, point to point and in groups.

Point to point is synchronous: ``send`` returns when the receiver has asked for the last
part, and messages between two ranks keep their order (one channel per direction). In a
group every member sends to every other directly: one hop, each byte travels once per
receiver, and a member that does not come is known by its number.

A call that fails or is interrupted half-way leaves the channels between the ranks out
of step, so every later call on this rank fails too and repeats why.
"""

import collections
import contextlib
import enum
import operator
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

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
from smp_tf.transport.engine import Engine, Memory
from smp_tf.transport.waiting import Request, Requests

_OBJECTS = 0x0F000000  # channel of send and recv_from; the groups' channels follow


class CommGroup(enum.Enum):
    """Groups of ranks that messages can be exchanged in."""

    WORLD = 0
    MP_GROUP = 1
    DP_GROUP = 2
    PP_GROUP = 3
    TP_GROUP = 4
    RDP_GROUP = 5


class RankType(enum.Enum):
    """How ranks are counted: by place in the caller's group of the same name."""

    WORLD_RANK = 0
    MP_RANK = 1
    DP_RANK = 2
    PP_RANK = 3
    TP_RANK = 4
    RDP_RANK = 5


class Messages:
    """The messages of one rank in one session (spec, section 3).

    ``engine`` may be None in a world of one rank, where nothing is ever sent.
    """

    def __init__(
        self,
        engine: Engine | None,
        topology: Topology,
        rank: int,
        job_id: str,
        timeout_s: float,
    ) -> None:
        self._engine = engine
        self._topology = topology
        self._rank = rank
        self._job_id = job_id
        self._timeout_s = timeout_s
        self._broken: str | None = None
        # Parts of two messages must not mix when several threads talk at once.
        self._posting = threading.Lock()
        self._receiving: dict[object, threading.Lock] = collections.defaultdict(
            threading.Lock
        )

    def send(self, obj: Any, dest_rank: int, rank_type: RankType) -> None:
        """Send to one rank; return when it has made the matching receive.

        Raises:
            ValueError: no such rank or rank type, or the caller itself.
            TransportError: the peer failed, or did not receive within timeout_s.
        """
        peer = self._peer("dest_rank", dest_rank, rank_type)
        self._deliver(obj, [peer], f"send(.., {dest_rank}, {rank_type.name})")

    def recv_from(self, src_rank: int, rank_type: RankType) -> Any:
        """Receive the next object that ``src_rank`` sent or broadcast.

        Raises:
            ValueError: no such rank or rank type, or the caller itself.
            TransportError: the peer failed, or did not send within timeout_s.
        """
        peer = self._peer("src_rank", src_rank, rank_type)
        call = f"recv_from({src_rank}, {rank_type.name})"
        with self._receiving[peer], self._requests(call) as requests:
            packet = _packet(requests, peer, _OBJECTS)
            return self._receive(requests, packet, _OBJECTS, Operation.OBJECT)

    def broadcast(self, obj: Any, group: CommGroup) -> None:
        """Send to every other member of ``group``; each calls ``recv_from``.

        Raises:
            ValueError: no such group.
            TransportError: as for ``send``.
        """
        peers = self._others(group)
        if peers:
            self._deliver(obj, peers, f"broadcast(.., {group.name})")

    def allgather(self, obj: Any, group: CommGroup) -> list[Any]:
        """Objects of all members, by group rank; the caller's own is ``obj`` itself.

        Raises:
            ValueError: no such group.
            TransportError: a member failed, or did not call within timeout_s.
        """
        return self._gather(obj, group, Operation.ALLGATHER)

    def barrier(self, group: CommGroup = CommGroup.WORLD) -> None:
        """Return when every member of ``group`` has called; raises as ``allgather``."""
        self._gather(None, group, Operation.BARRIER)

    def members(self, group: CommGroup) -> Sequence[int]:
        """World ranks of the caller's ``group``, by group rank.

        Raises:
            ValueError: ``group`` is not a CommGroup.
        """
        if not isinstance(group, CommGroup):
            names = ", ".join(f"smp.{member}" for member in CommGroup)
            raise ValueError(f"`group` must be one of {names}; group={group!r}.")
        if group is CommGroup.WORLD:
            return range(self._topology.size)
        return {
            CommGroup.MP_GROUP: self._topology.mp_group,
            CommGroup.DP_GROUP: self._topology.dp_group,
            CommGroup.PP_GROUP: self._topology.pp_group,
            CommGroup.TP_GROUP: self._topology.tp_group,
            CommGroup.RDP_GROUP: self._topology.rdp_group,
        }[group](self._rank)

    @contextlib.contextmanager
    def within(self, seconds: float) -> Iterator[None]:
        """Calls inside wait for at most so long, if that is less than timeout_s."""
        before, self._timeout_s = self._timeout_s, min(seconds, self._timeout_s)
        try:
            yield
        finally:
            self._timeout_s = before

    def _peer(self, argument: str, number: int, rank_type: RankType) -> int:
        """World rank of a rank that is not the caller, or ValueError."""
        if not isinstance(rank_type, RankType):
            names = ", ".join(f"smp.{member}" for member in RankType)
            raise ValueError(
                f"`rank_type` must be one of {names}; rank_type={rank_type!r}."
            )
        members = self.members(CommGroup(rank_type.value))
        try:
            place = operator.index(number)
        except TypeError:
            place = -1
        if not 0 <= place < len(members):
            raise ValueError(
                f"`{argument}` must be 0..{len(members) - 1} for {rank_type.name}; "
                f"{argument}={number!r}, rank={self._rank}, members={list(members)}."
            )
        if members[place] == self._rank:
            raise ValueError(
                f"`{argument}` is the caller itself; {argument}={number!r}, "
                f"rank_type={rank_type.name}, rank={self._rank}."
            )
        return members[place]

    def _others(self, group: CommGroup) -> list[int]:
        return [peer for peer in self.members(group) if peer != self._rank]

    def _deliver(self, obj: Any, peers: Sequence[int], call: str) -> None:
        parts = encode(obj, Operation.OBJECT, self._job_id)
        with self._requests(call) as requests:
            self._post(requests, peers, _OBJECTS, parts, synchronous=True)
            requests.wait_all()

    def _gather(self, obj: Any, group: CommGroup, operation: Operation) -> list[Any]:
        members, peers = self.members(group), self._others(group)
        if not peers:
            return [obj]
        channel = _OBJECTS + 1 + group.value
        parts = encode(obj, operation, self._job_id)
        call = f"{operation.name.lower()}({group.name})"
        with self._receiving[group], self._requests(call) as requests:
            packets = [_packet(requests, peer, channel) for peer in peers]
            self._post(requests, peers, channel, parts, synchronous=False)
            objects = {self._rank: obj}
            for packet in packets:
                objects[packet.peer] = self._receive(
                    requests, packet, channel, operation
                )
            requests.wait_all()
        return [objects[member] for member in members]

    def _requests(self, call: str) -> Requests:
        if self._broken is not None:
            raise TransportError(
                f"rank {self._rank} cannot go on after an earlier failure: {call}; "
                f"it was: {self._broken}"
            )
        assert self._engine is not None  # a world of one has no peers
        return Requests(
            self._engine, f"rank {self._rank} in {call}", self._timeout_s, self._break
        )

    def _break(self, reason: str) -> None:
        self._broken = self._broken or reason

    def _post(
        self,
        requests: Requests,
        peers: Sequence[int],
        channel: int,
        parts: Sequence[Memory],
        *,
        synchronous: bool,
    ) -> None:
        with self._posting:
            for peer in peers:
                for part in parts:
                    last = part is parts[-1]
                    requests.send(
                        peer, channel, part, synchronous=synchronous and last
                    )

    def _receive(
        self,
        requests: Requests,
        packet: Request,
        channel: int,
        operation: Operation,
    ) -> Any:
        """Wait for a first part, then for the parts it announces; the object."""
        head = read_packet(requests.wait(packet), operation, self._job_id)
        body = head.body
        if body is None:
            memory = np.empty(head.body_bytes, np.uint8)
            body = requests.wait(requests.receive(packet.peer, channel, memory))
        buffers = [
            requests.receive(packet.peer, channel, np.empty(length, np.uint8))
            for length in buffer_lengths(body, head.num_buffers)
        ]
        return decode(body, [requests.wait(buffer) for buffer in buffers])


def _packet(requests: Requests, peer: int, channel: int) -> Request:
    return requests.receive(peer, channel, np.empty(PACKET_BYTES, np.uint8))
