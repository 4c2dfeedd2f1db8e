"""The directory of a checkpoint as this process sees it, which may be a part of it."""

import dataclasses
import json
import pathlib
import re
import shutil

import tensorflow as tf

from smp_tf.checkpoint import manifest as manifest_lib
from smp_tf.checkpoint.manifest import Manifest
from smp_tf.errors import ConfigError

_PART = re.compile(r"mp_rank_(\d+)$")

_ENDINGS = (
    r"(_parts|\.(index|data-\d+-of-\d+)(\.tempstate.*)?|\.manifest\.json(\.new)?"
    r"|\.rank_\d+\.(json(\.new)?|iterators[._].*))"
)
"""Of all files of a save. Those of ``ckpt-2.5-1`` are none of ``ckpt-2``."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the folder of one part has of a save.

    Attributes:
        place: in the folder's ``checkpoint`` file, which names saves that were whole,
            in their order; -1 if it does not name this one.
        has_files: besides its name in that file.
        mp_size: the number of parts; 0 if the manifest is gone or cannot be read.
    """

    number: int
    part: int
    place: int = -1
    has_files: bool = True
    save_id: str = ""
    order: int = -1
    mp_size: int = 0
    error: str = ""

    @property
    def is_committed(self) -> bool:
        """Whether it was whole once."""
        return self.place >= 0


class Folder:
    """``<directory>/mp_rank_<k>/<name>-<n>``, for all k and n."""

    def __init__(self, directory: str, name: str) -> None:
        self.directory, self.name = pathlib.Path(directory), name
        self._number = re.compile(rf"{re.escape(name)}-(\d+){_ENDINGS}$")

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
            committed, numbers = self.committed(part), self.numbers(part)
            for number in sorted({*numbers, *committed}):
                place = committed.index(number) if number in committed else -1
                seen = Seen(number, part, place, number in numbers)
                found.append(self._with_manifest(seen))
        return found

    def _with_manifest(self, seen: Seen) -> Seen:
        try:
            manifest = manifest_lib.read(self.manifest_path(seen.part, seen.number))
        except FileNotFoundError:
            return seen
        except ConfigError as error:
            return dataclasses.replace(seen, error=str(error))
        return dataclasses.replace(
            seen,
            save_id=manifest.save_id,
            order=manifest.order,
            mp_size=manifest.layout.mp_size,
        )

    def committed(self, part: int) -> list[int]:
        """Of the saves that were whole once, in their order."""
        beginning = f"{self.name}-"
        found = [
            name.removeprefix(beginning)
            for name in self.declared(part)
            if name.startswith(beginning)
        ]
        return [int(number) for number in found if number.isdecimal()]

    def declared(self, part: int) -> list[str]:
        """All names in the ``checkpoint`` file of a part."""
        state = tf.train.get_checkpoint_state(str(self.part(part)))
        if state is None:
            return []
        return [pathlib.Path(p).name for p in state.all_model_checkpoint_paths]

    def manifest(self, number: int) -> Manifest | None:
        """Of a save, from any part that is here."""
        for part in self.parts():
            path = self.manifest_path(part, number)
            if path.exists():
                return manifest_lib.read(path)
        return None

    def declare(self, part: int, numbers: list[int]) -> None:
        """Write the ``checkpoint`` file of a part; the last number is the latest. What
        is there by other names stays."""
        own = {f"{self.name}-{number}" for number in self.committed(part)}
        names = [name for name in self.declared(part) if name not in own]
        names += [f"{self.name}-{number}" for number in numbers]
        path = self.part(part) / "checkpoint"
        if not names:
            path.unlink(missing_ok=True)
            return
        texts = [json.dumps(name) for name in names]
        lines = [f"model_checkpoint_path: {texts[-1]}"]
        lines += [f"all_model_checkpoint_paths: {text}" for text in texts]
        manifest_lib.write_text(path, "\n".join(lines) + "\n")

    def remove(self, part: int, number: int) -> None:
        """Remove a save of a part, beginning with what makes it whole."""
        self.manifest_path(part, number).unlink(missing_ok=True)
        if not self.part(part).is_dir():
            return
        for path in sorted(self.part(part).iterdir()):
            match = self._number.match(path.name)
            if match is None or int(match[1]) != number:
                continue
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
