"""A partition as a small file, to be read, edited by hand, and used again.

    plan.save("partition.json")                     smp.plan, or a step in a job
    smp.init({"partition_file": "partition.json"})  every step then follows it

One line for each atom, in order of first use; a partition number that is changed moves
what the line names. The step that follows need not be traced from the same batch: rows
are told by their place where the traced graphs are equal, else by the names of layers
and variables.
"""

import collections
import dataclasses
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from smp_tf.config import Config
from smp_tf.errors import ConfigError, PartitionError
from smp_tf.plan.atoms import Atom, Atoms
from smp_tf.plan.graph import Graph, short_hash
from smp_tf.plan.text_file import read_text, replace_text

_FORMAT, _VERSION = "smp_tf partition", 1
_KEYS = ("format", "version", "partitions", "fingerprint", "atoms")
_ROW_KEYS = ("partition", "layers", "variables")
_AGAIN = "save it again with plan.save(path)"


@dataclasses.dataclass(frozen=True)
class Row:
    """Where one atom is; it is known by the names of its layers and variables."""

    partition: int
    layers: tuple[str, ...]
    variables: tuple[str, ...]

    @property
    def key(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        return self.layers, self.variables


@dataclasses.dataclass(frozen=True)
class PartitionFile:
    """What such a file says.

    Attributes:
        fingerprint: of the graph that it was made from.
        source: where it was read, for errors.
    """

    num_partitions: int
    fingerprint: str
    rows: tuple[Row, ...]
    source: str = dataclasses.field(default="", compare=False)

    def to_text(self) -> str:
        """One line for each atom."""
        head = {
            "format": _FORMAT,
            "version": _VERSION,
            "partitions": self.num_partitions,
            "fingerprint": self.fingerprint,
        }
        lines = [f" {_json(key)}: {_json(value)}," for key, value in head.items()]
        rows = ",\n".join(f"  {_json(dataclasses.asdict(row))}" for row in self.rows)
        return "\n".join(["{", *lines, ' "atoms": [', rows, " ]", "}", ""])

    def digest(self) -> str:
        """Equal for files that say the same."""
        return short_hash(self.to_text())


def describe_partition(
    graph: Graph, atoms: Atoms, partition_of_atom: Sequence[int], num_partitions: int
) -> PartitionFile:
    """What to save of a plan."""
    rows = tuple(
        Row(partition, *_names(graph, atom))
        for atom, partition in zip(atoms.atoms, partition_of_atom, strict=True)
    )
    return PartitionFile(num_partitions, graph.fingerprint(), rows)


# --- text -> value


def parse_partition(text: str, num_partitions: int, source: str) -> PartitionFile:
    """Read a file's text for a job of so many partitions.

    Raises:
        ConfigError: it is no such file, was made for another number of partitions, or
            leaves a partition empty; names ``source``.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise _wrong(source, f"must hold JSON: {error}", _AGAIN) from None
    _check_keys(found, _KEYS, source, "the file")
    _check(found, "format", found["format"] == _FORMAT, f'"{_FORMAT}"', source)
    is_known = _is_integer(found["version"]) and found["version"] == _VERSION
    _check(found, "version", is_known, f"{_VERSION}", source)
    count, fingerprint = found["partitions"], found["fingerprint"]
    is_fitting = _is_integer(count) and count == num_partitions
    wanted = f"{num_partitions}, as in the configuration"
    _check(found, "partitions", is_fitting, wanted, source)
    _check(found, "fingerprint", isinstance(fingerprint, str), "a text", source)
    _check(found, "atoms", isinstance(found["atoms"], list), "a list", source)
    rows = tuple(
        _row(each, num_partitions, source, f"atoms[{i}]")
        for i, each in enumerate(found["atoms"])
    )
    empty = sorted(set(range(num_partitions)) - {row.partition for row in rows})
    if empty:
        raise _wrong(
            source,
            f"each partition needs at least one atom: empty partitions={empty}"
            f" partitions={num_partitions}",
            "move a row to each of them",
        )
    return PartitionFile(num_partitions, fingerprint, rows, source)


def _row(found: Any, num_partitions: int, source: str, place: str) -> Row:
    _check_keys(found, _ROW_KEYS, source, place)
    partition = found["partition"]
    is_there = _is_integer(partition) and 0 <= partition < num_partitions
    allowed = f"a number from 0 to {num_partitions - 1}"
    _check(found, "partition", is_there, allowed, source, f"{place}: ")
    for key in ("layers", "variables"):
        are_names = isinstance(found[key], list) and all(
            isinstance(name, str) for name in found[key]
        )
        _check(found, key, are_names, "a list of names", source, f"{place}: ")
    return Row(partition, tuple(found["layers"]), tuple(found["variables"]))


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_keys(found: Any, keys: Sequence[str], source: str, place: str) -> None:
    if not isinstance(found, dict) or set(found) != set(keys):
        has = list(found) if isinstance(found, dict) else type(found).__name__
        raise _wrong(
            source, f"{place} must have the keys {list(keys)}: found={has}", _AGAIN
        )


def _check(
    found: Mapping[str, Any],
    key: str,
    is_right: bool,
    allowed: str,
    source: str,
    place: str = "",
) -> None:
    if not is_right:
        value = _json(found[key])[:200]
        rule = f"{place}`{key}` must be {allowed}: {key}={value}"
        raise _wrong(source, rule, f"change it, or {_AGAIN}")


def _wrong(source: str, rule: str, remedy: str) -> ConfigError:
    return ConfigError(f"`partition_file`: {rule}; partition_file={source}; {remedy}")


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False)


# --- value -> the partition of a step


def follow_file(
    given: PartitionFile,
    graph: Graph,
    atoms: Atoms,
    earlier: Sequence[int | None] | None,
) -> tuple[int, ...]:
    """The partition of each atom as the file has it.

    Args:
        earlier: what earlier steps decided about each atom, which stays; None when they
            decided nothing. Only then must the file know every atom that has a name.

    Raises:
        PartitionError: the file does not know an atom, or has its parts on different
            partitions.
    """
    if earlier is None:
        chosen = _chosen(given, graph, atoms, is_complete=True)
    else:
        by_file = _chosen(given, graph, atoms, is_complete=False)
        chosen = [b if a is None else a for a, b in zip(earlier, by_file, strict=True)]
    # What has no name goes where the atom before it is.
    last = next((each for each in chosen if each is not None), 0)
    settled = []
    for partition in chosen:
        last = last if partition is None else partition
        settled.append(last)
    return tuple(settled)


def _chosen(
    given: PartitionFile, graph: Graph, atoms: Atoms, is_complete: bool
) -> Sequence[int | None]:
    names = [Row(-1, *_names(graph, atom)) for atom in atoms.atoms]
    if _is_same_trace(given, graph, names):
        return [row.partition for row in given.rows]
    finder = _ByName(given, names)
    found: list[int | None] = []
    last: int | None = None
    for name in names:
        partition = None
        try:
            if name.layers or name.variables:
                partition = last = finder.partition_of(name, last)
        except PartitionError:
            if is_complete:
                raise
        found.append(partition)
    return found


def _is_same_trace(given: PartitionFile, graph: Graph, names: Sequence[Row]) -> bool:
    """Whether the rows are the atoms, one by one, whatever they are called here: Keras
    counts on in automatic names. Rows that somebody has put in another order are not.
    """
    if len(given.rows) != len(names) or given.fingerprint != graph.fingerprint():
        return False
    theirs, ours = ([row.key for row in rows] for rows in (given.rows, names))
    is_reordered = theirs != ours and (
        collections.Counter(theirs) == collections.Counter(ours)
    )
    return not is_reordered


class _ByName:
    """Finds the rows of a file that name the same things as an atom."""

    def __init__(self, given: PartitionFile, names: Iterable[Row]) -> None:
        self.given = given
        rows: dict[tuple[tuple[str, ...], tuple[str, ...]], list[int]] = {}
        self.partitions_of: dict[tuple[str, str], set[int]] = {}
        for row in given.rows:
            rows.setdefault(row.key, []).append(row.partition)
            for part in _parts(row):
                self.partitions_of.setdefault(part, set()).add(row.partition)
        # Equal names, such as of what a model does between its layers, come in order.
        counts = collections.Counter(name.key for name in names)
        self.in_order = {
            key: iter(partitions)
            for key, partitions in rows.items()
            if len(partitions) == counts[key]
        }

    def partition_of(self, name: Row, last: int | None) -> int:
        """
        Args:
            last: partition of the atom before, taken where the file allows several.

        Raises:
            PartitionError: the file does not know it, or wants it torn apart.
        """
        if name.key in self.in_order:
            return next(self.in_order[name.key])
        known = {
            p: self.partitions_of[p] for p in _parts(name) if p in self.partitions_of
        }
        if not known:
            raise self._error(
                "the file must say where every layer is",
                name,
                "add a row for it, or save the plan of this step. Keras counts on in"
                " automatic names; give layers a name to know them again",
            )
        allowed = set.intersection(*known.values())
        if not allowed:
            where = ", ".join(
                f"{what} {part!r} on {sorted(partitions)}"
                for (what, part), partitions in known.items()
            )
            raise self._error(
                f"what shares a variable must be on one partition: {where}",
                name,
                "put these rows on one partition",
            )
        return last if last in allowed else min(allowed)

    def _error(self, rule: str, name: Row, remedy: str) -> PartitionError:
        return PartitionError(
            f"`partition_file`: {rule}: layers={list(name.layers)}"
            f" variables={list(name.variables)};"
            f" partition_file={self.given.source}; {remedy}"
        )


def _parts(row: Row) -> list[tuple[str, str]]:
    layers = [("layer", name) for name in row.layers]
    return layers + [("variable", name) for name in row.variables]


def _names(graph: Graph, atom: Atom) -> tuple[tuple[str, ...], tuple[str, ...]]:
    return atom.layers, tuple(graph.variables[i].name for i in atom.variables)


# --- files


def partition_file_of(config: Config) -> PartitionFile | None:
    """Read and check the file that a configuration names; None if it names none.

    Raises:
        ConfigError: as ``parse_partition``, or the file cannot be read.
    """
    if config.partition_file is None:
        return None
    text = read_text("partition_file", config.partition_file, _AGAIN)
    return parse_partition(text, config.partitions, repr(config.partition_file))


def save_partition(path: str | os.PathLike[str], saved: PartitionFile) -> None:
    """Write it all, or leave what was there."""
    replace_text(path, saved.to_text())
