"""Stages and messages: what a step consists of before anyone decides an order.

A *stage* is a segment's position in pipeline order, over forward and backward
segments alike. Two partitions in a chain give four stages:

    stage      0     1     2     3
    kind       F     F     B     B
    pp_rank    0     1     1     0

A partition may be visited several times. With tied embeddings the last forward
stage is on pp_rank 0 again, where the weights are:

    stage      0     1     2     3     4     5
    kind       F     F     F     B     B     B
    pp_rank    0     1     0     0     1     0

Stages form a graph through `needs`, not only a chain.
"""

from __future__ import annotations

import enum
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from smp_tf.errors import ScheduleError

__all__ = ["Kind", "Message", "Pipeline", "Stage"]


class Kind(enum.Enum):
    """What an action does. The value is its spelling in text."""

    F = "F"
    B = "B"
    I = "I"  # noqa: E741  (the field's letter)
    W = "W"
    SEND_F = "SEND_F"
    RECV_F = "RECV_F"
    SEND_B = "SEND_B"
    RECV_B = "RECV_B"

    # Plain attributes: they are asked for every action, and there are many.
    def __init__(self, text: str) -> None:
        self.is_compute = text in ("F", "B", "I", "W")
        self.is_send = text.startswith("SEND")
        self.is_recv = text.startswith("RECV")
        # B, I or W, or a message with the outputs of one.
        self.is_backward = not text.endswith("F")

    @property
    def send(self) -> Kind:
        """The kind that sends the outputs of such a stage."""
        return Kind.SEND_B if self.is_backward else Kind.SEND_F

    @property
    def recv(self) -> Kind:
        """The kind that receives the outputs of such a stage."""
        return Kind.RECV_B if self.is_backward else Kind.RECV_F


@dataclass(frozen=True)
class Stage:
    """One segment as the scheduler sees it.

    Attributes:
        kind: F; B for a whole backward; or its two parts: I makes the gradients that
            other stages wait for, W the rest, which is mostly those of weights.
        rank: the pp_rank that runs it.
        needs: stages whose outputs it reads for the same microbatch, with the
            forward stages of its own rank whose activations it reads.
        seconds: estimated time for one microbatch; only ratios matter.
        after: stages of its rank that must be done with the microbatch before, for
            they change a variable that it uses.
    """

    kind: Kind
    rank: int
    needs: tuple[int, ...] = ()
    seconds: float = 1.0
    after: tuple[int, ...] = ()


@dataclass(frozen=True, order=True)
class Message:
    """The outputs of `stage` go to pp_rank `peer`, once per microbatch.

    The peer runs a stage that needs them, or returns them to the caller.

    Attributes:
        seconds: estimated time from the end of the stage to the arrival; negative where
            the outputs leave before the stage ends. No part of what tells messages
            apart.
    """

    stage: int
    peer: int
    seconds: float = field(default=0.0, compare=False)


@dataclass(frozen=True)
class Pipeline:
    """All stages of a step, in an order in which they could run one by one.

    Attributes:
        stages: every stage needs only stages before it, and no F needs a backward.
        num_ranks: partitions, also those without a stage.
        messages: one for every pair of a stage and another rank that reads its
            outputs.

    Raises:
        ScheduleError: one of these rules is broken.
    """

    stages: tuple[Stage, ...]
    num_ranks: int
    messages: tuple[Message, ...] = ()

    def __post_init__(self) -> None:
        if self.num_ranks < 1:
            raise ScheduleError(
                f"a pipeline has at least one rank; num_ranks={self.num_ranks}"
            )
        for index, stage in enumerate(self.stages):
            self._check_stage(index, stage)
        self._check_messages()

    def _check_stage(self, index: int, stage: Stage) -> None:
        if not stage.kind.is_compute:
            raise ScheduleError(
                f"stage {index}: a stage is F, B, I or W; kind={stage.kind.value}"
            )
        if not 0 <= stage.rank < self.num_ranks:
            raise ScheduleError(
                f"stage {index}: no such pp_rank; rank={stage.rank}, "
                f"num_ranks={self.num_ranks}"
            )
        if not 0.0 <= stage.seconds < math.inf:
            raise ScheduleError(
                f"stage {index}: seconds must be finite and not negative; "
                f"seconds={stage.seconds}"
            )
        for other in stage.after:
            known = 0 <= other < len(self.stages)
            if not known or self.stages[other].rank != stage.rank:
                raise ScheduleError(
                    f"stage {index}: a stage may only come after stages of its rank; "
                    f"after={other}"
                )
        for need in stage.needs:
            if not 0 <= need < index:
                raise ScheduleError(
                    f"stage {index}: a stage may only need stages before it; "
                    f"needs={need}"
                )
            if not stage.kind.is_backward and self.stages[need].kind.is_backward:
                raise ScheduleError(
                    f"stage {index}: a forward stage cannot need a backward one; "
                    f"needs={need}; what depends on gradients belongs to a backward "
                    "stage"
                )

    def _check_messages(self) -> None:
        seen = set()
        for message in self.messages:
            known = 0 <= message.stage < len(self.stages)
            if not known or not 0 <= message.peer < self.num_ranks:
                raise ScheduleError(
                    f"{message}: no such stage or peer; "
                    f"stages={len(self.stages)}, num_ranks={self.num_ranks}"
                )
            if message.peer == self.stages[message.stage].rank:
                raise ScheduleError(f"{message}: a rank sends itself no message")
            if not -self.stages[message.stage].seconds <= message.seconds < math.inf:
                raise ScheduleError(
                    f"{message}: seconds must be finite, and a message cannot arrive "
                    "before its stage begins; "
                    f"seconds of the stage={self.stages[message.stage].seconds}"
                )
            if message in seen:
                raise ScheduleError(f"{message}: listed twice")
            seen.add(message)
        for index, stage in enumerate(self.stages):
            for need in stage.needs:
                message = Message(need, stage.rank)
                if self.stages[need].rank != stage.rank and message not in seen:
                    raise ScheduleError(
                        f"stage {index} on rank {stage.rank} needs stage {need} of "
                        f"rank {self.stages[need].rank}, but no message carries "
                        f"it; add {message}"
                    )

    @classmethod
    def from_stages(
        cls,
        stages: Iterable[Stage],
        num_ranks: int,
        returns: Iterable[Message] = (),
    ) -> Pipeline:
        """Build a pipeline and derive its messages from what the stages need.

        Args:
            stages: as in the class.
            num_ranks: as in the class.
            returns: messages for returned values, which no stage reads.
        """
        stages = tuple(stages)
        messages = set(returns)
        for stage in stages:
            messages |= {
                Message(need, stage.rank)
                for need in stage.needs
                # A bad index is reported by __post_init__, with its place.
                if 0 <= need < len(stages) and stages[need].rank != stage.rank
            }
        return cls(stages, num_ranks, tuple(sorted(messages)))

    @classmethod
    def chain(
        cls,
        num_ranks: int,
        forward_seconds: float = 1.0,
        backward_seconds: float = 1.0,
        weight_seconds: float | None = None,
        ranks: Sequence[int] | None = None,
        message_seconds: float = 0.0,
    ) -> Pipeline:
        """Build the textbook pipeline: F down the ranks, then B back up.

        `chain(3)` has stages 0:F@0 1:F@1 2:F@2 3:B@2 4:B@1 5:B@0; each B also
        needs the F of its own piece. Split backwards are I and W next to each other:
        `chain(2, 1.0, 1.0, 1.0)` has 0:F@0 1:F@1 2:I@1 3:W@1 4:I@0 5:W@0.

        Args:
            num_ranks: as in the class.
            forward_seconds: of F of every piece.
            backward_seconds: of B of every piece, or of I where they are split.
            weight_seconds: of W of every piece; None for whole backwards.
            ranks: the rank of each piece in order, one piece for each rank if not
                said. `rank_of_piece` knows the usual placements.
            message_seconds: of every message.
        """
        ranks = range(num_ranks) if ranks is None else ranks
        stages = [
            Stage(Kind.F, rank, (piece - 1,) if piece else (), forward_seconds)
            for piece, rank in enumerate(ranks)
        ]
        later: tuple[int, ...] = ()
        for piece in reversed(range(len(ranks))):
            rank, back = ranks[piece], len(stages)
            kind = Kind.B if weight_seconds is None else Kind.I
            stages.append(Stage(kind, rank, (piece, *later), backward_seconds))
            if weight_seconds is not None:
                stages.append(Stage(Kind.W, rank, (piece, back), weight_seconds))
            later = (back,)
        found = cls.from_stages(stages, num_ranks)
        if not message_seconds:
            return found
        messages = [
            replace(message, seconds=message_seconds) for message in found.messages
        ]
        return replace(found, messages=tuple(messages))

    @cached_property
    def ancestors(self) -> tuple[frozenset[int], ...]:
        """For each stage, every stage it needs, directly or through others."""
        found: list[frozenset[int]] = []
        for stage in self.stages:
            found.append(
                frozenset(stage.needs).union(*(found[need] for need in stage.needs))
            )
        return tuple(found)

    @cached_property
    def holders(self) -> tuple[tuple[int, ...], ...]:
        """For each stage, the backward ones that let go of its microbatch on its rank.

        A microbatch is *live* at a forward stage from its start there until all
        its holders are done: so long its activations take memory. Holders are the
        backward stages of the same rank that read this stage or, if none does, the
        first ones that depend on it. Empty for backward stages, and for F that none
        of the same rank depends on.
        """
        return tuple(self._holders(index) for index in range(len(self.stages)))

    def _holders(self, index: int) -> tuple[int, ...]:
        if self.stages[index].kind.is_backward:
            return ()
        after = [
            later
            for later in range(index + 1, len(self.stages))
            if self.stages[later].kind.is_backward
            and self.stages[later].rank == self.stages[index].rank
            and index in self.ancestors[later]
        ]
        readers = [later for later in after if index in self.stages[later].needs]
        return tuple(
            readers or (s for s in after if self.ancestors[s].isdisjoint(after))
        )
