"""Which tensors travel from GPU to GPU, and the connections that they take.

Two ranks send to each other by NCCL if both have a GPU and the same NCCL. What
TensorFlow keeps in the memory of the host (int32, strings), and all that goes to or
comes from a rank without, takes UCX: its operations stand on the CPU, and TensorFlow
copies.
"""

import dataclasses
import itertools
import logging
from collections.abc import Sequence

from smp_tf.errors import TransportError
from smp_tf.launch import NCCL_SHARING, keep_nccl_on_host, nccl_shares_gpus
from smp_tf.plan.program import Operation, Program
from smp_tf.runtime.pinning import Pinned
from smp_tf.transport.engine import Engine
from smp_tf.transport.messages import CommGroup, Messages, RankType

HOST_DTYPES = frozenset({"int32", "string", "resource", "variant"})
"""TensorFlow's kernels for GPUs read and write these in the memory of the host."""

logger = logging.getLogger("smp_tf")


@dataclasses.dataclass(frozen=True)
class Card:
    """What a rank tells the others of itself.

    Attributes:
        version: of its NCCL; "" if it cannot use it.
        gpu: uuid, or that it is not known; "" if it has none.
        why_not: why it does without NCCL; "" if it has no GPU or can use it.
        shares: NCCL lets it share its GPU with other ranks.
    """

    version: str = ""
    gpu: str = ""
    why_not: str = ""
    shares: bool = False


class GpuLinks:
    """The connections of this rank; without a GPU there never is one."""

    def __init__(
        self,
        engine: Engine | None = None,
        messages: Messages | None = None,
        rank: int = 0,
        cards: Sequence[Card] = (Card(),),
    ) -> None:
        """``cards``: of all ranks of the job, if any of them has a GPU."""
        self._engine = engine
        self._messages = messages
        self._rank = rank
        self._cards = cards
        self._connected: set[tuple[int, int]] = set()
        self._groups: dict[CommGroup, int] = {}

    def device_of(self, dtype: str, peer: int) -> str:
        """Where the operations for a tensor stand that goes to, or comes from, a rank.

        Args:
            peer: world rank.

        Returns:
            "GPU:0", "CPU:0", or "" where there is nothing to choose.
        """
        if not self._cards[self._rank].gpu:
            return ""
        return "GPU:0" if self._is_direct(dtype, peer) else "CPU:0"

    def _is_direct(self, dtype: str, peer: int) -> bool:
        mine = self._cards[self._rank]
        if not mine.gpu or dtype in HOST_DTYPES:
            return False
        return not why_not_nccl(mine, self._cards[peer])

    def why_not_nccl(self, peer: int) -> str:
        """Why tensors for a rank do not go by NCCL; "" if they do."""
        if peer >= len(self._cards):
            return "no rank has a GPU"
        return why_not_nccl(self._cards[self._rank], self._cards[peer])

    def connect(self, program: Program, peers: Sequence[int]) -> None:
        """Make the connections that a program needs and that are not there.

        Every rank of ``peers`` (pp_rank -> world rank) must call it with its program of
        the same step. All take the connections in the same order, so that nobody waits
        for a rank that waits for it.

        Raises:
            TransportError: a rank failed, or did not come within timeout_s.
        """
        wanted: set[tuple[int, int]] = set()  # from, to
        for instruction in program.instructions:
            channel = instruction.channel
            if channel is None:
                continue
            peer = peers[channel.peer]
            if self._is_direct(channel.spec.dtype, peer):
                sends = instruction.operation is Operation.SEND
                wanted.add((self._rank, peer) if sends else (peer, self._rank))
        for source, target in sorted(wanted - self._connected):
            self._connect(source, target)
            self._connected.add((source, target))

    def group_for_sums(self, group: CommGroup) -> int | None:
        """The number of a group for ``ops.sum_post``; None where it cannot use NCCL.

        The first call connects: every rank of the group must make it, with the same
        group.

        Raises:
            TransportError: a rank failed, or did not come within timeout_s.
        """
        if self._engine is None or self._messages is None:
            return None
        ranks = self._messages.members(group)
        pairs = itertools.combinations([self._cards[rank] for rank in ranks], 2)
        if len(ranks) == 1 or any(why_not_nccl(*pair) for pair in pairs):
            return None
        if group not in self._groups:
            mine = self._engine.nccl_id() if ranks[0] == self._rank else b""
            made = self._messages.allgather(mine, group)[0]
            self._groups[group] = self._engine.connect_group(ranks, made)
        return self._groups[group]

    def _connect(self, source: int, target: int) -> None:
        assert self._engine is not None and self._messages is not None
        if source == self._rank:
            made = self._engine.nccl_id()
            self._messages.send(made, target, RankType.WORLD_RANK)
            self._engine.connect_gpu(target, True, made)
        else:
            made = self._messages.recv_from(source, RankType.WORLD_RANK)
            self._engine.connect_gpu(source, False, made)


def open_links(
    engine: Engine,
    messages: Messages,
    rank: int,
    gpus: Sequence[Pinned],
    one_host: bool,
) -> GpuLinks:
    """Find out who can send to whom. Every rank of the job must call it.

    Args:
        gpus: of all ranks.
        one_host: all ranks are on the same host.

    Raises:
        TransportError: a rank failed, or did not come within timeout_s.
    """
    if all(gpu.ordinal is None for gpu in gpus):
        return GpuLinks()
    if one_host:
        keep_nccl_on_host()
    cards = messages.allgather(_card(engine, gpus[rank]), CommGroup.WORLD)
    for peer, card in enumerate(cards[rank + 1 :], rank + 1):
        why_not = why_not_nccl(cards[rank], card)
        if why_not and (cards[rank].gpu or card.gpu):
            logger.info("rank %d and rank %d use UCX: %s", rank, peer, why_not)
    return GpuLinks(engine, messages, rank, cards)


def why_not_nccl(one: Card, other: Card) -> str:
    """Why two ranks do without NCCL; "" if they need not. The same for both of them."""
    if not (one.gpu and other.gpu):
        return "one of them has no GPU"
    for card in sorted((one, other), key=dataclasses.astuple):
        if card.why_not:
            return card.why_not
    if one.version != other.version:
        versions = " and ".join(sorted((one.version, other.version)))
        return f"they have different versions of NCCL: {versions}"
    if one.gpu == other.gpu and not (one.shares and other.shares):
        return (
            "they are on the same GPU, which NCCL supports from 2.30 on, with"
            f" {NCCL_SHARING}=1"
        )
    return ""


def _card(engine: Engine, gpu: Pinned) -> Card:
    if gpu.ordinal is None:
        return Card()
    # Imports TensorFlow, which a process without GPU may not need.
    from smp_tf.transport import nccl

    if not gpu.uuid:
        return Card(gpu="unknown", why_not="it is not known which GPU a rank has")
    library = nccl.found()
    if library.why_not:
        return Card(gpu=gpu.uuid, why_not=f"no NCCL: {library.why_not}")
    try:
        engine.open_gpu(gpu.ordinal)
    except TransportError as error:
        return Card(gpu=gpu.uuid, why_not=str(error))
    shares = nccl_shares_gpus() and _is_new(library.version)
    return Card(library.version, gpu.uuid, shares=shares)


def _is_new(version: str) -> bool:
    """Whether an NCCL heeds the variable; an older one refuses a second rank."""
    major, minor = version.split(".")[:2]
    return (int(major), int(minor)) >= (2, 30)
