"""What says that a save is whole, and what is in it.

    <directory>/mp_rank_0/ckpt-3.index, ckpt-3.data-..    variables of mp_rank 0
                          ckpt-3.rank_0.json, ..          what each rank keeps to itself
                          ckpt-3.manifest.json            all files of all parts
                mp_rank_1/ckpt-3.index, ..
                          ckpt-3.manifest.json            the same

A save is whole if the manifest with the same save_id is in the folders of all its
parts. Manifests are written when everything else is on disk.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from smp_tf.errors import ConfigError

VERSION = 1

ENDING = ".manifest.json"

_CHUNK_BYTES = 2**22


@dataclasses.dataclass(frozen=True)
class Layout:
    """The job that made a save.

    Attributes:
        sharded: whether the replicas divided the optimizer's slots.
    """

    mp_size: int
    pp_size: int
    dp_size: int
    sharded: bool

    def is_like(self, other: "Layout") -> bool:
        """Whether a rank of one holds what the rank of the same number holds in the
        other, but for slots."""
        return dataclasses.replace(self, sharded=other.sharded) == other


@dataclasses.dataclass(frozen=True)
class Entry:
    """A variable: in the part of ``mp_rank``, under its name."""

    name: str
    mp_rank: int
    shape: tuple[int, ...]
    dtype: str


@dataclasses.dataclass(frozen=True)
class File:
    """A file of a part; ``size`` in bytes."""

    size: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A whole save.

    Attributes:
        save_id: of this save only.
        number: the n of ``ckpt-n``.
        order: saves into a directory are counted by it, whatever their numbers are.
        step: value of the manager's step_counter, None without one.
        entries: all variables, by name.
        files: all files, by their path in the checkpoint directory.
        trained: names of the trained variables, in the order of the whole model: a
            Keras optimizer of one process keeps its slots in this order.
        version: of this format.
    """

    save_id: str
    number: int
    order: int
    step: int | None
    layout: Layout
    entries: Mapping[str, Entry]
    files: Mapping[str, File]
    trained: tuple[str, ...] = ()
    version: int = VERSION

    def to_json(self) -> str:
        content = dataclasses.asdict(self)
        content["entries"] = [
            dataclasses.asdict(entry) for _, entry in sorted(self.entries.items())
        ]
        return json.dumps(content, indent=1)


def from_json(text: str, file: str) -> Manifest:
    """The manifest that ``to_json`` wrote.

    Args:
        file: where the text is from, for the error.

    Raises:
        ConfigError: it is damaged, or of another version of this format.
    """
    try:
        content: dict[str, Any] = json.loads(text)
        version = content["version"]
        if version == VERSION:
            entries = [
                Entry(**{**entry, "shape": tuple(entry["shape"])})
                for entry in content.pop("entries")
            ]
            files = content.pop("files")
            return Manifest(
                layout=Layout(**content.pop("layout")),
                entries={entry.name: entry for entry in entries},
                files={path: File(**each) for path, each in files.items()},
                trained=tuple(content.pop("trained")),
                **content,
            )
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"a checkpoint's manifest cannot be read: file={file!r}:"
            f" {type(error).__name__}: {error}; restore another checkpoint by its"
            " restore_prefix, or bring the file back from a copy"
        ) from error
    raise ConfigError(
        f"a checkpoint is of another version of the format: file={file!r}"
        f" version={version!r}; this smp_tf reads version {VERSION}: read it with the"
        " smp_tf that wrote it"
    )


def read(path: pathlib.Path) -> Manifest:
    """Raises as ``from_json``; OSError if there is no such file."""
    return from_json(path.read_text(errors="replace"), str(path))


def write_text(path: pathlib.Path, text: str) -> None:
    """Write a file so that it is there as a whole or not at all, also after a loss of
    power."""
    new = path.with_name(f"{path.name}.new")
    with naming(new), new.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    new.replace(path)
    sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: pathlib.Path) -> Iterator[None]:
    """An error of the disk inside names the file: of an open file it does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise


def make_folder(folder: pathlib.Path) -> None:
    """Make a folder and those above it, to be there also after a loss of power."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: pathlib.Path) -> None:
    """Wait until the names in a folder are on disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with naming(folder):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def file_of(path: pathlib.Path) -> File:
    """Size and checksum of what is on disk."""
    digest = hashlib.sha256()
    with naming(path), path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return File(path.stat().st_size, digest.hexdigest())
