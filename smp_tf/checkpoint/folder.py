"""The directory of a checkpoint as this process sees it, which may be a part of it."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Mapping

import tensorflow as tf

from smp_tf.checkpoint import manifest as manifest_lib
from smp_tf.checkpoint.manifest import Manifest
from smp_tf.errors import ConfigError

_PART = re.compile(r"mp_rank_(\d+)$")


@dataclasses.dataclass(frozen=True)
class Seen:
    """A manifest in the folder of one part.

    Attributes:
        committed: the folder's ``checkpoint`` file names the save: once it was whole.
        mp_size: the number of parts; 0 if the manifest is gone or cannot be read.
    """

    number: int
    part: int
    committed: bool
    save_id: str = ""
    order: int = -1
    mp_size: int = 0
    error: str = ""


@dataclasses.dataclass(frozen=True)
class Save:
    """A save, as all ranks together see it."""

    number: int
    order: int
    save_id: str


class Folder:
    """``<directory>/mp_rank_<k>/<name>-<n>``, for all k and n."""

    def __init__(self, directory: str, name: str) -> None:
        self.directory, self.name = pathlib.Path(directory), name
        self._number = re.compile(rf"{re.escape(name)}-(\d+)[._]")

    def part(self, mp_rank: int) -> pathlib.Path:
        return self.directory / f"mp_rank_{mp_rank}"

    def prefix(self, mp_rank: int, number: int) -> pathlib.Path:
        """Of the files of a part."""
        return self.part(mp_rank) / f"{self.name}-{number}"

    def manifest_path(self, mp_rank: int, number: int) -> pathlib.Path:
        prefix = self.prefix(mp_rank, number)
        return prefix.with_name(f"{prefix.name}{manifest_lib.ENDING}")

    def parts(self) -> list[int]:
        """The parts that have a folder here."""
        if not self.directory.is_dir():
            return []
        found = map(_PART.match, (each.name for each in self.directory.iterdir()))
        return sorted(int(match[1]) for match in found if match)

    def numbers(self, part: int) -> list[int]:
        """Of all saves that have a file in a part, whole or not."""
        if not self.part(part).is_dir():
            return []
        names = (each.name for each in self.part(part).iterdir())
        found = map(self._number.match, names)
        return sorted({int(match[1]) for match in found if match})

    def scan(self) -> list[Seen]:
        """What is known of all saves that this process sees."""
        found = []
        for part in self.parts():
            committed = self._committed(part)
            for number in sorted({*self.numbers(part), *committed}):
                is_committed = number in committed
                found.append(self._seen(part, number, is_committed))
        return found

    def _seen(self, part: int, number: int, committed: bool) -> Seen:
        try:
            manifest = manifest_lib.read(self.manifest_path(part, number))
        except FileNotFoundError:
            return Seen(number, part, committed)
        except ConfigError as error:
            return Seen(number, part, committed, error=str(error))
        return Seen(
            number,
            part,
            committed,
            manifest.save_id,
            manifest.order,
            manifest.layout.mp_size,
        )

    def _committed(self, part: int) -> list[int]:
        state = tf.train.get_checkpoint_state(str(self.part(part)))
        if state is None:
            return []
        names = (pathlib.Path(p).name for p in state.all_model_checkpoint_paths)
        found = (self._number.match(f"{name}.") for name in names)
        return [int(match[1]) for match in found if match]

    def manifest(self, number: int) -> Manifest | None:
        """Of a save, from any part that is here."""
        for part in self.parts():
            path = self.manifest_path(part, number)
            if path.exists():
                return manifest_lib.read(path)
        return None

    def declare(self, part: int, numbers: list[int]) -> None:
        """Write the ``checkpoint`` file of a part; the last number is the latest."""
        if not numbers:
            (self.part(part) / "checkpoint").unlink(missing_ok=True)
            return
        names = [json.dumps(f"{self.name}-{number}") for number in numbers]
        lines = [f"model_checkpoint_path: {names[-1]}"]
        lines += [f"all_model_checkpoint_paths: {name}" for name in names]
        path = self.part(part) / "checkpoint"
        manifest_lib.write_text(path, "\n".join(lines) + "\n")

    def remove(self, part: int, number: int) -> None:
        """Remove a save of a part, beginning with what makes it whole."""
        self.manifest_path(part, number).unlink(missing_ok=True)
        prefix = self.prefix(part, number)
        for path in sorted(prefix.parent.glob(f"{_escaped(prefix.name)}[._]*")):
            if path.is_dir():
                for each in path.iterdir():
                    each.unlink()
                path.rmdir()
            else:
                path.unlink(missing_ok=True)


def _escaped(text: str) -> str:
    return re.sub(r"([\[\]*?])", r"[\1]", text)


def whole_saves(seen: Iterable[Seen]) -> list[Save]:
    """The whole ones, the latest last."""
    parts = _parts_of(seen)
    found = [
        Save(number, any_part.order, save_id)
        for (number, save_id), by_part in parts.items()
        for any_part in [next(iter(by_part.values()))]
        if save_id and set(range(any_part.mp_size)) <= by_part.keys()
    ]
    return sorted(found, key=lambda save: save.order)


def _parts_of(seen: Iterable[Seen]) -> Mapping[tuple[int, str], dict[int, Seen]]:
    parts: dict[tuple[int, str], dict[int, Seen]] = {}
    for each in seen:
        parts.setdefault((each.number, each.save_id), {})[each.part] = each
    return parts


def why_not_whole(folder: Folder, seen: Iterable[Seen], number: int) -> str:
    """What is wrong with a save that is not whole: an error text."""
    known = [each for each in seen if each.number == number]
    where = f"directory={str(folder.directory)!r} checkpoint={folder.name}-{number}"
    for each in known:
        if each.error:
            return each.error
    sizes = {each.mp_size for each in known if each.mp_size}
    if not sizes:
        return f"there is no such checkpoint: {where}"
    have = {each.part for each in known if each.save_id}
    gone = [part for part in range(max(sizes)) if part not in have]
    files = [str(folder.manifest_path(part, number)) for part in gone]
    return (
        f"parts of a checkpoint are missing: {where} missing={files}; bring them back"
        " from a copy, or restore another checkpoint by its restore_prefix"
    )
