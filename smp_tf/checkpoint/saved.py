"""The saves in a directory, for one process that sees all of their parts."""

import dataclasses
import pathlib
import re
from collections.abc import Sequence
from typing import Any

from smp_tf.checkpoint.folder import Folder, whole_saves, why_not_whole
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
    path = pathlib.Path(directory)
    names = [checkpoint_name] if checkpoint_name else _names(path)
    found = []
    for name in names:
        folder = Folder(str(path), name)
        for save in whole_saves(folder.scan()):
            manifest = folder.manifest(save.number)
            if manifest is not None:
                found.append(Saved(folder, manifest))
    if not found:
        raise ConfigError(
            f"there is no whole checkpoint: directory={str(path)!r}"
            f"{_told_parts(path)}; it is the directory that was given to"
            " smp.CheckpointManager, with the mp_rank_.. folders of all hosts in it"
        )
    return found


def find(directory: Any, prefix: str | None = None) -> Saved:
    """One save.

    Args:
        prefix: ``ckpt-3``; by default the latest.

    Raises:
        ConfigError: there is no such save, parts of it are missing, or there are saves
            of several names to choose from.
    """
    if prefix is None:
        found = saves_in(directory)
        names = {saved.folder.name for saved in found}
        if len(names) > 1:
            latest = {saved.folder.name: saved.name for saved in found}
            raise ConfigError(
                "there are checkpoints of several names:"
                f" directory={str(directory)!r}; choose one of"
                f" {sorted(latest.values())} by its prefix"
            )
        return found[-1]
    match = _PREFIX.match(pathlib.PurePath(prefix).name)
    if match is None:
        raise ConfigError(
            "a prefix is the name of a checkpoint with its number: such as ckpt-3:"
            f" prefix={prefix!r}"
        )
    folder, number = Folder(str(directory), match["name"]), int(match["number"])
    seen = folder.scan()
    if number not in [save.number for save in whole_saves(seen)]:
        raise ConfigError(why_not_whole(folder, seen, number))
    manifest = folder.manifest(number)
    assert manifest is not None
    return Saved(folder, manifest)


def _names(directory: pathlib.Path) -> Sequence[str]:
    found = (_MANIFEST.match(each.name) for each in directory.glob("mp_rank_*/*"))
    return sorted({match["name"] for match in found if match})


def _told_parts(directory: pathlib.Path) -> str:
    parts = Folder(str(directory), "").parts()
    return f" parts={parts}" if parts else ""
