"""Why a layer is on its partition: what it would mean on the neighbour's.

At each border between two partitions the nearest atoms are moved over, in thought, and
the partitioner's own figures (see ``problem``) are taken again:

    partition 0       a  b  c | d  e  f       partition 1
    one atom          a  b | c  d  e  f       c to partition 1
                      a  b  c  d | e  f       d to partition 0
    the next border   a | b  c  d  e  f       b and c, if cut there no more crosses
"""

import dataclasses
import enum
import itertools
from collections.abc import Sequence

from smp_tf.plan.partition import SLACK
from smp_tf.plan.problem import Problem

FARTHEST = 100
"""Atoms that are looked at on each side of a border for the next one."""

TINY = 1e-9
"""Sums of floats in another order differ in their last digits."""


class Reason(enum.Enum):
    """What speaks first against a move, in the partitioner's order."""

    OVER_LIMIT = "a rank would be above the memory limit"
    EMPTY = "the partition would be empty"
    HEAVIER = "the fullest rank would be fuller"
    CUTS_MORE = "more bytes would cross ranks"
    MORE_MESSAGES = "as many bytes, in more messages"
    NONE = "nothing"


@dataclasses.dataclass(frozen=True)
class Figures:
    """What the partitioner compares.

    Attributes:
        fullest: load of the fullest rank; 1 is an even share.
        cut_bytes: that cross ranks for one microbatch, forward and backward.
        messages: tensors that do.
        most_bytes: memory of the rank that needs most.
    """

    fullest: float
    cut_bytes: int
    messages: int
    most_bytes: int


@dataclasses.dataclass(frozen=True)
class Move:
    """Atoms that could be on the partition next to theirs.

    Attributes:
        atoms: in the order of the model.
        after: figures of the whole plan with them there.
    """

    atoms: tuple[int, ...]
    source: int
    target: int
    before: Figures
    after: Figures
    reason: Reason


@dataclasses.dataclass(frozen=True)
class Border:
    """Between partition ``left`` and the next one.

    Attributes:
        last, first: of ``left``, of the next one: moved alone.
        earlier, later: moves to the nearest other border at which no more bytes cross;
            None where there is none, or where it is one atom away.
    """

    left: int
    last: Move
    first: Move
    earlier: Move | None
    later: Move | None

    @property
    def moves(self) -> tuple[Move, ...]:
        every = (self.last, self.first, self.earlier, self.later)
        return tuple(move for move in every if move)


def figures(problem: Problem, chosen: Sequence[int]) -> Figures:
    """Of atoms on these partitions."""
    return Figures(
        fullest=max(problem.loads(chosen)) * problem.num_partitions,
        cut_bytes=problem.cut_bytes(chosen),
        messages=problem.num_messages(chosen),
        most_bytes=max(problem.memory(chosen)),
    )


def borders(problem: Problem, chosen: Sequence[int]) -> tuple[Border, ...]:
    """One for each pair of neighbours that both have atoms.

    Args:
        chosen: partition of each atom.
    """
    now = figures(problem, chosen)
    members: list[list[int]] = [[] for _ in range(problem.num_partitions)]
    for atom, partition in enumerate(chosen):
        members[partition].append(atom)
    found = []
    for left, (ours, theirs) in enumerate(itertools.pairwise(members)):
        if not ours or not theirs:
            continue
        # Edges lead from lower to higher atoms, so the last ones of a partition can
        # always go to the next one, and the first ones to the one before.
        backwards = [tuple(ours[-n:]) for n in _lengths(ours)]
        onwards = [tuple(theirs[:n]) for n in _lengths(theirs)]
        found.append(
            Border(
                left,
                last=_move(problem, chosen, now, backwards[0], left + 1),
                first=_move(problem, chosen, now, onwards[0], left),
                earlier=_next(problem, chosen, now, backwards, left + 1),
                later=_next(problem, chosen, now, onwards, left),
            )
        )
    return tuple(found)


def _lengths(atoms: Sequence[int]) -> range:
    return range(1, min(len(atoms), FARTHEST) + 1)


def _next(
    problem: Problem,
    chosen: Sequence[int],
    now: Figures,
    stretches: Sequence[tuple[int, ...]],
    target: int,
) -> Move | None:
    """The shortest stretch after which no more bytes cross; the whole partition, the
    last stretch, cannot go."""
    for atoms in stretches[:-1]:
        if problem.cut_bytes(_moved(chosen, atoms, target)) <= now.cut_bytes:
            if len(atoms) == 1:
                return None
            return _move(problem, chosen, now, atoms, target)
    return None


def _move(
    problem: Problem,
    chosen: Sequence[int],
    now: Figures,
    atoms: tuple[int, ...],
    target: int,
) -> Move:
    source = chosen[atoms[0]]
    moved = _moved(chosen, atoms, target)
    after = figures(problem, moved)
    reason = _reason(now, after, problem.memory_limit)
    if source not in moved:
        reason = Reason.EMPTY
    return Move(atoms, source, target, now, after, reason)


def _moved(chosen: Sequence[int], atoms: Sequence[int], target: int) -> list[int]:
    found = list(chosen)
    for atom in atoms:
        found[atom] = target
    return found


def _reason(before: Figures, after: Figures, limit: int | None) -> Reason:
    if limit is not None and max(limit, before.most_bytes) < after.most_bytes:
        return Reason.OVER_LIMIT
    # The partitioner gives up so much balance for fewer bytes, and no more.
    if after.fullest > before.fullest * (1 + SLACK):
        return Reason.HEAVIER
    if after.cut_bytes > before.cut_bytes:
        return Reason.CUTS_MORE
    if after.messages > before.messages and after.cut_bytes == before.cut_bytes:
        return Reason.MORE_MESSAGES
    # The partitioner gives up so much balance for fewer bytes, and no more.
    if after.fullest > before.fullest * (1 + TINY):
        return Reason.HEAVIER
    return Reason.NONE
