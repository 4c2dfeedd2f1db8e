"""Actions and schedules: the order in which a pipeline runs, as readable text.

An *action* is one stage applied to one microbatch, or one message that carries
the outputs of a stage to another pp_rank. Both ends of a message name the same
stage, the one whose outputs travel:

    1F0          pp_rank 1 runs stage 1, a forward, on microbatch 0
    2I0  3W0     the two halves of a backward: input and weight gradients
    0SEND_F2>1   the outputs of stage 0, microbatch 2, leave for pp_rank 1
    0RECV_F2<0   ... and arrive from pp_rank 0

A *schedule* is one list of actions per pp_rank. Its text form is CSV, one line per
pp_rank; it is what golden files hold, and it is what runs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from smp_tf.errors import ScheduleError
from smp_tf.plan.pipeline import Kind, Message, Pipeline, Stage

# The vocabulary of scheduling can be imported from here as a whole.
__all__ = ["Action", "Kind", "Message", "Pipeline", "Schedule", "Stage"]

_TEXT = re.compile(
    r"(?P<stage>\d+)"
    r"(?:(?P<compute>[FBIW])(?P<mb>\d+)"
    r"|(?P<send>SEND_[FB])(?P<sent>\d+)>(?P<to>\d+)"
    r"|(?P<recv>RECV_[FB])(?P<received>\d+)<(?P<origin>\d+))",
    re.ASCII,
)


@dataclass(frozen=True)
class Action:
    """One stage applied to one microbatch, or one message about it.

    Attributes:
        kind: F, B, I, W, or one of the messages.
        stage: the stage that runs, or whose outputs travel.
        mb: microbatch.
        peer: the pp_rank at the other end of a message; None for computation.
    """

    kind: Kind
    stage: int
    mb: int
    peer: int | None = None

    def __post_init__(self) -> None:
        if self.kind.is_compute != (self.peer is None):
            raise ScheduleError(
                "messages have a peer, F, B, I and W have none; "
                f"kind={self.kind.value}, stage={self.stage}, mb={self.mb}, "
                f"peer={self.peer}"
            )

    def __str__(self) -> str:
        text = f"{self.stage}{self.kind.value}{self.mb}"
        if self.peer is None:
            return text
        return f"{text}{'>' if self.kind.is_send else '<'}{self.peer}"

    @classmethod
    def from_text(cls, text: str) -> Action:
        """Parse what str() prints.

        Raises:
            ScheduleError: text is no action.
        """
        match = _TEXT.fullmatch(text)
        if match is None:
            raise ScheduleError(
                f"not an action; text={text!r}; write 1F0, 0SEND_F2>1 or 0RECV_F2<0"
            )
        stage = int(match["stage"])
        if match["compute"]:
            return cls(Kind(match["compute"]), stage, int(match["mb"]))
        if match["send"]:
            return cls(Kind(match["send"]), stage, int(match["sent"]), int(match["to"]))
        return cls(
            Kind(match["recv"]), stage, int(match["received"]), int(match["origin"])
        )


@dataclass(frozen=True)
class Schedule:
    """What every pp_rank does, in order: `ranks[pp_rank][position]`."""

    ranks: tuple[tuple[Action, ...], ...]

    @property
    def has_messages(self) -> bool:
        """Whether `comm.add_messages` has been here."""
        return any(a.peer is not None for actions in self.ranks for a in actions)

    def to_text(self) -> str:
        """Print as CSV, one line per pp_rank; from_text() reads it back."""
        return "".join(",".join(map(str, actions)) + "\n" for actions in self.ranks)

    @classmethod
    def from_text(cls, text: str) -> Schedule:
        """Parse CSV, one line per pp_rank; an empty line is an idle rank.

        Blanks around a cell are ignored, so that columns may be aligned; so are lines
        that begin with #, so that a file may say what it holds.

        Raises:
            ScheduleError: a cell is no action; names rank and step.
        """
        lines = [line for line in text.splitlines() if not line.startswith("#")]
        ranks = []
        for rank, line in enumerate(lines):
            actions = []
            for step, cell in enumerate(line.split(",") if line.strip() else ()):
                try:
                    actions.append(Action.from_text(cell.strip()))
                except ScheduleError as error:
                    raise ScheduleError(f"rank {rank} step {step}: {error}") from None
            ranks.append(tuple(actions))
        return cls(tuple(ranks))

    def grid(
        self,
        columns: Sequence[Sequence[int]] | None = None,
        marks: Iterable[tuple[int, int]] = (),
        margin: int = 8,
    ) -> str:
        """Draw one row per rank and one column per time step.

        Args:
            columns: column of each action, ascending on a rank, as
                `dry_run.time_steps` computes them; without it, action k of every
                rank is in column k.
            marks: (rank, position) of actions to put in [brackets].
            margin: with marks, columns further away from them are left out.

        Returns:
            Text without a newline at its end, for example

                step      0    1    2    3    4      5
                rank 0  0F0  0F1    .  3B0    .  [3B1]
                rank 1    .  1F0  2B0  1F1  2B1      .
        """
        if columns is None:
            columns = [range(len(actions)) for actions in self.ranks]
        marked = set(marks)
        cells: dict[tuple[int, int], str] = {}
        for rank, actions in enumerate(self.ranks):
            for position, action in enumerate(actions):
                text = f"[{action}]" if (rank, position) in marked else str(action)
                cells[rank, columns[rank][position]] = text
        last = max((column for _, column in cells), default=-1)
        focus = [columns[rank][position] for rank, position in marked]
        shown = range(
            max(min(focus) - margin, 0) if focus else 0,
            min(max(focus) + margin, last) + 1 if focus else last + 1,
        )
        rows = [["step", *map(str, shown)]]
        for rank in range(len(self.ranks)):
            row = [cells.get((rank, column), ".") for column in shown]
            rows.append([f"rank {rank}", *row])
        widths = [max(map(len, column)) for column in zip(*rows)]
        return "\n".join(
            "  ".join(
                [row[0].ljust(widths[0])]
                + [cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]
            )
            for row in rows
        )

    def error(self, problem: str, *places: tuple[int, int]) -> ScheduleError:
        """Make an error: place, problem, and the grid with the places marked.

        Args:
            problem: what is wrong, with values.
            places: (rank, position) of the actions concerned, the guilty one
                first; none when something is missing.
        """
        place = "rank {} step {}: ".format(*places[0]) if places else ""
        return ScheduleError(f"{place}{problem}\n{self.grid(marks=places)}")
