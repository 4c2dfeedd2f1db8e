"""One run of a step on one rank, as it was recorded.

    recorder's events + the rank's program  ->  RankRun: calls, waits, sends

Times are nanoseconds of one clock: this process's monotonic one, or after ``shifted``
that of rank 0.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol

from smp_tf.plan.action import Action
from smp_tf.plan.pipeline import Pipeline
from smp_tf.plan.program import Operation, Program

BEGIN, END = -1, -2
"""What the recorder calls the two ends of a run, where else the index of an
instruction stands."""


class Recorded(Protocol):
    """What the recorder gives: ``transport.events.Event``."""

    @property
    def program(self) -> int: ...

    @property
    def event(self) -> int: ...

    @property
    def run(self) -> int: ...

    @property
    def start_ns(self) -> int: ...

    @property
    def end_ns(self) -> int: ...

    @property
    def bytes(self) -> int: ...


class Label(NamedTuple):
    """What an instruction is, for people; ``tensor`` is "" for a call."""

    action: Action
    tensor: str = ""


class Span(NamedTuple):
    """An action and when it was; ``bytes`` for a message.

    A call ends when its segment is done, a wait when the tensor is there, and a send
    when it has left this rank.
    """

    action: Action
    start_ns: int
    end_ns: int
    tensor: str = ""
    bytes: int = 0

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


@dataclasses.dataclass(frozen=True)
class RankRun:
    """What one rank did in one run of a step, each list in the order of its starts.

    Attributes:
        step: number of the step among those of the session, in the order of building.
        run: counts the runs of all steps of the process.
    """

    step: int
    run: int
    start_ns: int
    end_ns: int
    calls: tuple[Span, ...] = ()
    waits: tuple[Span, ...] = ()
    sends: tuple[Span, ...] = ()

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9

    def shifted(self, offset_ns: int) -> RankRun:
        """The same on a clock that shows ``offset_ns`` more."""
        if not offset_ns:
            return self
        calls, waits, sends = (
            tuple(
                span._replace(
                    start_ns=span.start_ns + offset_ns, end_ns=span.end_ns + offset_ns
                )
                for span in spans
            )
            for spans in (self.calls, self.waits, self.sends)
        )
        return RankRun(
            self.step,
            self.run,
            self.start_ns + offset_ns,
            self.end_ns + offset_ns,
            calls,
            waits,
            sends,
        )


def labels_of(program: Program, pipeline: Pipeline) -> tuple[Label | None, ...]:
    """One for each instruction; None for those that nobody looks at."""
    found: list[Label | None] = []
    for instruction in program.instructions:
        kind, peer, tensor = pipeline.stages[instruction.stage].kind, None, ""
        if instruction.channel is not None:
            peer, tensor = instruction.channel.peer, instruction.channel.tensor
            is_send = instruction.operation is Operation.SEND
            kind = kind.send if is_send else kind.recv
        label = Label(Action(kind, instruction.stage, instruction.mb, peer), tensor)
        found.append(None if instruction.operation is Operation.POST else label)
    return tuple(found)


class Times(NamedTuple):
    """When one run was, and each of its instructions.

    Attributes:
        spans: (start, index of the instruction, end, bytes), in this order.
    """

    run: int
    start_ns: int
    end_ns: int
    spans: list[tuple[int, int, int, int]]


def times_of(events: Iterable[Recorded]) -> Times:
    """Put the events of one complete run in order.

    Pieces of a call become one: the sums between them are part of its work.
    """
    start_ns = end_ns = run = 0
    found: dict[int, tuple[int, int, int, int]] = {}
    for event in events:
        run, index = event.run, event.event
        if index == BEGIN:
            start_ns = event.start_ns
        elif index == END:
            end_ns = event.end_ns
        else:
            span = event.start_ns, index, event.end_ns, event.bytes
            if index in found:
                start, _, end, size = found[index]
                span = min(span[0], start), index, max(span[2], end), size
            found[index] = span
    return Times(run, start_ns, end_ns, sorted(found.values()))


def run_of_events(
    step: int, events: Iterable[Recorded], labels: Sequence[Label | None]
) -> RankRun:
    """The run that one complete run's events tell of."""
    times = times_of(events)
    calls: list[Span] = []
    waits: list[Span] = []
    sends: list[Span] = []
    for start, index, end, size in times.spans:
        label = labels[index]
        if label is None:
            continue
        span = Span(label.action, start, end, label.tensor, size)
        if label.action.peer is None:
            calls.append(span._replace(bytes=0))
        else:
            (sends if label.action.kind.is_send else waits).append(span)
    return RankRun(
        step,
        times.run,
        times.start_ns,
        times.end_ns,
        tuple(calls),
        tuple(waits),
        tuple(sends),
    )


def split_runs(events: Iterable[Recorded]) -> list[list[Recorded]]:
    """Events of several runs, run by run, in the order given."""
    found: dict[int, list[Recorded]] = {}
    for event in events:
        found.setdefault(event.run, []).append(event)
    return list(found.values())
