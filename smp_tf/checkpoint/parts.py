"""Who writes which variable, and how its value gets there.

    rank of mp_rank k, dp_rank 0     writes the part k
    other dp_ranks of mp_rank k      send it one by one what only they have: slots

A variable that several mp_ranks have is in the part of the first of them.
"""

import dataclasses
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from smp_tf.checkpoint.bundle import bundle_writer
from smp_tf.checkpoint.manifest import Entry, naming
from smp_tf.checkpoint.together import attempt, portable
from smp_tf.errors import SmpError
from smp_tf.frontend.variables import owner_elsewhere, value_of
from smp_tf.runtime import session

Known = Mapping[str, tuple[tuple[int, ...], str]]
"""Name -> shape and dtype of the variables that a rank has."""


def here(variables: Mapping[str, Any]) -> dict[str, Any]:
    """Those that have their values in this process."""
    return {
        name: variable
        for name, variable in variables.items()
        if owner_elsewhere(variable) is None
    }


def known(variables: Mapping[str, Any]) -> Known:
    """What other ranks must know of this rank's variables."""
    return {
        name: (tuple(variable.shape), variable.dtype.name)
        for name, variable in variables.items()
    }


@dataclasses.dataclass(frozen=True)
class Parts:
    """Attributes:
    entries: all variables, by name.
    providers: name -> the world rank that has the value.
    """

    entries: Mapping[str, Entry]
    providers: Mapping[str, int]

    def of(self, mp_rank: int) -> list[str]:
        """The names in a part, in the order in which they travel."""
        names = self.entries.items()
        return sorted(name for name, entry in names if entry.mp_rank == mp_rank)


def divide(every: Sequence[Known]) -> Parts:
    """Who writes what, from what each rank has, by world rank; the same on all ranks.

    Raises:
        SmpError: the ranks have different variables under one name.
    """
    topology = session.current("CheckpointManager").topology
    entries: dict[str, Entry] = {}
    providers: dict[str, int] = {}
    places = sorted(
        (topology.mp_rank(rank), topology.dp_rank(rank), rank)
        for rank in range(len(every))
    )
    for mp_rank, _, rank in places:
        for name, (shape, dtype) in every[rank].items():
            entry = Entry(name, mp_rank, shape, dtype)
            first = entries.setdefault(name, entry)
            if dataclasses.replace(entry, mp_rank=first.mp_rank) != first:
                other = providers[name]
                raise SmpError(
                    "a variable must be the same on all ranks that have it:"
                    f" variable={name!r} rank {other}: {first.shape} {first.dtype},"
                    f" rank {rank}: {shape} {dtype}; run the same code on all ranks"
                )
            providers.setdefault(name, rank)
    return Parts(entries, providers)


def is_writer() -> bool:
    """Whether this rank writes the part of its mp_rank."""
    return session.dp_rank() == 0


def values(
    parts: Parts, variables: Mapping[str, Any]
) -> Iterator[tuple[str, Any, tuple[bool, str] | None]]:
    """On the writer of a part: (name, value as a NumPy array, error) of each variable.

    It must be read to its end: other ranks wait. They call ``provide``.
    """
    ranks = session.get_dp_group()
    for name in parts.of(session.mp_rank()):
        provider = parts.providers[name]
        if provider == session.rank():
            value, error = attempt(lambda: value_of(variables[name]).numpy())
            yield name, value, portable(error)
        else:
            value, text = session.recv_from(ranks.index(provider), session.DP_RANK)
            yield name, value, text


def provide(parts: Parts, variables: Mapping[str, Any]) -> None:
    """On the other ranks of a part: send the writer what it has not."""
    for name in parts.of(session.mp_rank()):
        if parts.providers[name] == session.rank():
            value, error = attempt(lambda: value_of(variables[name]).numpy())
            session.send((value, portable(error)), 0, session.DP_RANK)


def write(
    prefix: pathlib.Path,
    found: Iterator[tuple[str, Any, tuple[bool, str] | None]],
) -> None:
    """Write the files of a part; none if it has no variables. Reads ``found`` to its
    end whatever happens.

    Raises:
        SmpError: a value could not be read, where it is.
        OSError, tf.errors.OpError: the files cannot be written.
    """
    first = next(found, None)
    if first is None:
        return
    try:
        with bundle_writer(str(prefix)) as writer:
            each: tuple[str, Any, tuple[bool, str] | None] | None = first
            while each is not None:
                name, value, error = each
                if error is not None:
                    raise SmpError(f"variable={name!r}: {error[1]}")
                writer.add(name, value)
                each = next(found, None)
    finally:
        for _ in found:
            pass
    for path in files_of(prefix):
        sync(path)


def files_of(prefix: pathlib.Path) -> list[pathlib.Path]:
    """The files of a bundle."""
    return [
        path
        for path in sorted(prefix.parent.iterdir())
        if path.name == f"{prefix.name}.index"
        or path.name.startswith(f"{prefix.name}.data-")
    ]


def sync(path: pathlib.Path) -> None:
    """Wait until a file is on disk."""
    with naming(path), path.open("rb") as file:
        os.fsync(file.fileno())
