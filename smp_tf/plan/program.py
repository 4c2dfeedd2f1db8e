"""The second narrow waist: what one rank does in a step, fully decided.

    (SegmentPlan, Schedule with messages, pp_rank) -> Program

A program is a list of instructions that run strictly one after the other. A receive has
two of them: it is posted some actions ahead, so that the tensor travels while the rank
computes, and waited for where it is read.

Receives from a rank are posted in the order in which that rank sends: NCCL knows no
tags, and matches by order (transport design; "Point To Point Communication Functions",
NCCL documentation). A tensor that is read late is posted early where another one of the
same rank, sent after it, is read before it.
"""

import dataclasses
import enum
import itertools
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from smp_tf.plan.action import Action, Schedule
from smp_tf.plan.graph import TensorSpec
from smp_tf.plan.segment import Cut, SegmentPlan

RECEIVE_AHEAD = 1
"""Compute actions between posting a receive and its reader. One loses nothing
against posting everything at step start, and bounds the receive buffers."""

PieceOf = Mapping[tuple[int, str], int]
"""(stage, tensor) -> which piece of the stage's segment makes it; 0 if not in it."""

_WHOLE: PieceOf = MappingProxyType({})


class Operation(enum.Enum):
    POST = "post"  # get ready to receive a tensor
    WAIT = "wait"  # until it is there
    CALL = "call"  # a segment
    SEND = "send"  # queue a tensor; never waits


@dataclasses.dataclass(frozen=True)
class Channel:
    """The route of one tensor of one microbatch.

    Attributes:
        number: the same on both ends, different for every (tensor, peer, microbatch) of
            every step of the job.
        peer: pp_rank at the other end.
        spec: dtype and static shape that both ends know.
    """

    number: int
    tensor: str
    peer: int
    spec: TensorSpec


@dataclasses.dataclass(frozen=True)
class Instruction:
    operation: Operation
    stage: int
    mb: int
    channel: Channel | None = None

    def __str__(self) -> str:
        text = f"{self.operation.value} stage {self.stage} microbatch {self.mb}"
        if self.channel is not None:
            text += f" {self.channel.tensor}"
        return text


@dataclasses.dataclass(frozen=True)
class Program:
    """What ``pp_rank`` does, in order."""

    pp_rank: int
    num_microbatches: int
    instructions: tuple[Instruction, ...]


def go_together(one: Instruction, after: Instruction) -> bool:
    """Whether two messages that follow each other may travel as one.

    Between GPUs who waits for one of a group waits for all of it. So a group is of one
    call and one rank: what another call sends may be an answer to what this one gets.
    """
    if one.channel is None or after.channel is None:
        return False

    def group(each: Instruction, peer: int) -> tuple[Operation, int, int, int]:
        return each.operation, each.stage, each.mb, peer

    return group(one, one.channel.peer) == group(after, after.channel.peer)


def num_channels(plan: SegmentPlan, num_microbatches: int) -> int:
    """Channel numbers that one step takes."""
    return len(plan.cuts) * num_microbatches


def lower_program(
    plan: SegmentPlan,
    schedule: Schedule,
    pp_rank: int,
    num_microbatches: int,
    first_channel: int,
    piece_of: PieceOf = _WHOLE,
) -> Program:
    """Spell out one rank's actions.

    Args:
        schedule: with messages, checked.
        first_channel: numbers below are taken by steps traced earlier.
        piece_of: of the segments of all ranks: what a piece makes leaves before the
            next one runs. The same on all ranks.
    """
    cuts: dict[tuple[int, int, int], list[tuple[int, Cut]]] = {}
    for index, cut in enumerate(plan.cuts):
        cuts.setdefault((cut.stage, cut.source, cut.peer), []).append((index, cut))
    for sent in cuts.values():
        sent.sort(key=lambda each: piece_of.get((each[1].stage, each[1].tensor), 0))

    def channels(action: Action, source: int, peer: int, other: int) -> list[Channel]:
        """In the order in which they are sent."""
        return [
            Channel(
                first_channel + index * num_microbatches + action.mb,
                cut.tensor,
                other,
                cut.spec,
            )
            for index, cut in cuts.get((action.stage, source, peer), ())
        ]

    before: list[list[Instruction]] = [[]]  # [k] goes directly before the k-th call
    calls: list[Instruction] = []
    posts: dict[int, Instruction] = {}  # channel -> its post
    place: dict[int, int] = {}  # channel -> call that its post goes before, or earlier
    for action in schedule.ranks[pp_rank]:
        if action.kind.is_compute:
            calls.append(Instruction(Operation.CALL, action.stage, action.mb))
            before.append([])
            continue
        assert action.peer is not None  # messages have one; checked by Action
        if action.kind.is_send:
            for channel in channels(action, pp_rank, action.peer, action.peer):
                before[-1].append(
                    Instruction(Operation.SEND, action.stage, action.mb, channel)
                )
            continue
        for channel in channels(action, action.peer, pp_rank, action.peer):
            mark = action.stage, action.mb, channel
            posts[channel.number] = Instruction(Operation.POST, *mark)
            place[channel.number] = max(len(calls) - RECEIVE_AHEAD, 0)
            before[-1].append(Instruction(Operation.WAIT, *mark))
    posted: list[list[Instruction]] = [[] for _ in before]
    for peer, actions in enumerate(schedule.ranks):
        numbers = [
            channel.number
            for action in actions
            if action.kind.is_send and action.peer == pp_rank
            for channel in channels(action, peer, pp_rank, peer)
        ]
        latest = [*itertools.accumulate((place[n] for n in reversed(numbers)), min)]
        for number, k in zip(numbers, reversed(latest), strict=True):
            posted[k].append(posts[number])
    return Program(pp_rank, num_microbatches, tuple(_in_order(before, posted, calls)))


def _in_order(
    before: Sequence[Sequence[Instruction]],
    posts: Sequence[Sequence[Instruction]],
    calls: Sequence[Instruction],
) -> list[Instruction]:
    """Sends of the previous call, posts for the next, waits for this one, the call."""
    ordered: list[Instruction] = []
    for k, here in enumerate(before):
        ordered += [i for i in here if i.operation is Operation.SEND]
        ordered += posts[k]
        ordered += [i for i in here if i.operation is Operation.WAIT]
        ordered += calls[k : k + 1]
    return ordered
