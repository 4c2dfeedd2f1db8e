"""The saves in a directory, for one process that sees all of their parts."""

import dataclasses
import pathlib
import re
from typing import Any

from smp_tf.checkpoint.choosing import (
    chosen,
    lost_numbers,
    whole_saves,
    why_not_whole,
)
from smp_tf.checkpoint.folder import Folder
from smp_tf.checkpoint.manifest import ENDING, Manifest
from smp_tf.checkpoint.restoring import Values
from smp_tf.errors import ConfigError

_MANIFEST = re.compile(rf"(?P<name>.+)-(?P<number>\d+){re.escape(ENDING)}$")
_PREFIX = re.compile(r"(?P<name>[^/]+)-(?P<number>\d+)$")


@dataclasses.dataclass(frozen=True)
class Saved:
    """A whole save."""

    folder: Folder
    manifest: Manifest

    @property
    def name(self) -> str:
        """``ckpt-3``"""
        return f"{self.folder.name}-{self.manifest.number}"

    @property
    def directory(self) -> pathlib.Path:
        return self.folder.directory

    def prefix(self, mp_rank: int) -> pathlib.Path:
        """Of the files of a part."""
        return self.folder.prefix(mp_rank, self.manifest.number)

    def values(self) -> Values:
        """Reads them one by one."""
        return Values(self.manifest, self.prefix)

    def where(self) -> str:
        """For errors."""
        return f"directory={str(self.directory)!r} checkpoint={self.name}"


def saves_in(directory: Any, checkpoint_name: str | None = None) -> list[Saved]:
    """The whole saves of a directory, by name, the latest of each last.

    Args:
        checkpoint_name: "ckpt" of ``ckpt-3``; None for all.

    Raises:
        ConfigError: there is no such directory, or it has none.
    """
    found = whole_in(directory, checkpoint_name)
    if not found:
        raise ConfigError(
            f"there is no whole checkpoint: directory={str(directory)!r}"
            f"{_told_parts(directory)}; it is the directory that was given to"
            " smp.CheckpointManager, with the mp_rank_.. folders of all hosts in it"
        )
    return found


def whole_in(directory: Any, checkpoint_name: str | None = None) -> list[Saved]:
    """As ``saves_in``; [] if there are none."""
    found = []
    for name in [checkpoint_name] if checkpoint_name else _names(directory):
        folder = Folder(str(directory), name)
        for save in whole_saves(folder.scan()):
            manifest = folder.manifest(save.number)
            if manifest is not None:
                found.append(Saved(folder, manifest))
    return found


def lost_in(directory: Any) -> dict[str, str]:
    """Saves of a directory that were whole once, or may be, and are not as it is seen
    from here: name -> why."""
    found = {}
    for name in _names(directory):
        folder = Folder(str(directory), name)
        seen = folder.scan()
        for number in sorted(lost_numbers(seen)):
            found[f"{name}-{number}"] = why_not_whole(folder, seen, number)
    return found


def find(directory: Any, prefix: str | None = None) -> Saved:
    """One save.

    Args:
        prefix: ``ckpt-3``; by default the latest.

    Raises:
        ConfigError: there is no such save, parts of it are missing, or there are saves
            of several names to choose from. That the latest is broken is no reason to
            take an older one.
    """
    if prefix is None:
        name, number = _only_name(directory), None
    else:
        match = _PREFIX.match(pathlib.PurePath(prefix).name)
        if match is None:
            raise ConfigError(
                "a prefix is the name of a checkpoint with its number: such as ckpt-3:"
                f" prefix={prefix!r}"
            )
        name, number = match["name"], int(match["number"])
    folder = Folder(str(directory), name)
    save = chosen(folder, folder.scan(), number)
    if save is None:
        return saves_in(directory, name)[-1]  # raises
    manifest = folder.manifest(save.number)
    assert manifest is not None
    return Saved(folder, manifest)


def _only_name(directory: Any) -> str:
    latest = {each.folder.name: each.name for each in whole_in(directory)}
    for name in lost_in(directory):
        latest.setdefault(name.rpartition("-")[0], name)
    if len(latest) > 1:
        raise ConfigError(
            f"there are checkpoints of several names: directory={str(directory)!r};"
            f" choose one of {sorted(latest.values())} by its prefix"
        )
    return next(iter(latest), "ckpt")


def _names(directory: Any) -> list[str]:
    files = pathlib.Path(directory).glob("mp_rank_*/*")
    matches = [_MANIFEST.match(each.name) for each in files]
    folder = Folder(str(directory), "")
    for part in folder.parts():
        matches += map(_PREFIX.match, folder.declared(part))
    return sorted({match["name"] for match in matches if match})


def _told_parts(directory: Any) -> str:
    parts = Folder(str(directory), "").parts()
    return f" parts={parts}" if parts else ""
