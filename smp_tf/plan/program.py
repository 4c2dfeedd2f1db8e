"""The second narrow waist: what one rank does in a step, fully decided.

    (SegmentPlan, Schedule with messages, pp_rank) -> Program

A program is a list of instructions that run strictly one after the other. A receive has
two of them: it is posted some actions ahead, so that the tensor travels while the rank
computes, and waited for where it is read.
"""

import dataclasses
import enum
from collections.abc import Sequence

from smp_tf.plan.action import Action, Schedule
from smp_tf.plan.graph import TensorSpec
from smp_tf.plan.segment import SegmentPlan

RECEIVE_AHEAD = 1
"""Compute actions between posting a receive and its reader. One loses nothing
against posting everything at step start, and bounds the receive buffers."""


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


def num_channels(plan: SegmentPlan, num_microbatches: int) -> int:
    """Channel numbers that one step takes."""
    return len(plan.cuts) * num_microbatches


def lower_program(
    plan: SegmentPlan,
    schedule: Schedule,
    pp_rank: int,
    num_microbatches: int,
    first_channel: int,
) -> Program:
    """Spell out one rank's actions.

    Args:
        schedule: with messages, checked.
        first_channel: numbers below are taken by steps traced earlier.
    """
    cuts = list(enumerate(plan.cuts))

    def channels(action: Action, source: int, peer: int, other: int) -> list[Channel]:
        return [
            Channel(
                first_channel + index * num_microbatches + action.mb,
                cut.tensor,
                other,
                cut.spec,
            )
            for index, cut in cuts
            if (cut.stage, cut.source, cut.peer) == (action.stage, source, peer)
        ]

    before: list[list[Instruction]] = [[]]  # [k] goes directly before the k-th call
    posts: list[list[Instruction]] = [
        []
    ]  # [k] goes directly before ``before[k]``'s call
    calls: list[Instruction] = []
    for action in schedule.ranks[pp_rank]:
        if action.kind.is_compute:
            calls.append(Instruction(Operation.CALL, action.stage, action.mb))
            before.append([])
            posts.append([])
            continue
        assert action.peer is not None  # messages have one; checked by Action
        if action.kind.is_send:
            for channel in channels(action, pp_rank, action.peer, action.peer):
                before[-1].append(
                    Instruction(Operation.SEND, action.stage, action.mb, channel)
                )
            continue
        for channel in channels(action, action.peer, pp_rank, action.peer):
            ahead = max(len(calls) - RECEIVE_AHEAD, 0)
            posts[ahead].append(
                Instruction(Operation.POST, action.stage, action.mb, channel)
            )
            before[-1].append(
                Instruction(Operation.WAIT, action.stage, action.mb, channel)
            )
    return Program(pp_rank, num_microbatches, tuple(_in_order(before, posts, calls)))


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
