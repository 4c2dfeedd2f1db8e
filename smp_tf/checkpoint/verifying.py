"""Whether the files of a checkpoint are what was written."""

import dataclasses
import pathlib
import re
from collections.abc import Collection

import tensorflow as tf

from smp_tf.checkpoint import manifest as manifest_lib
from smp_tf.checkpoint.bundle import READ_ERRORS
from smp_tf.checkpoint.saved import Saved
from smp_tf.errors import ConfigError

_OF_PART = re.compile(r"(?P<prefix>.*)\.(index|data-\d+-of-\d+)$")


@dataclasses.dataclass(frozen=True)
class Damage:
    """What is wrong with a file.

    Attributes:
        path: in the checkpoint directory.
        variables: that cannot be read, in the order of their names.
    """

    path: str
    text: str
    variables: tuple[str, ...] = ()


def verify(save: Saved, parts: Collection[int] | None = None) -> list[Damage]:
    """The files that are not as they were written; [] if all are.

    Args:
        parts: only the files with the variables of these.
    """
    found = []
    for path, wanted in sorted(save.manifest.files.items()):
        if parts is not None and not _is_in(save, path, parts):
            continue
        on_disk = save.directory / path
        try:
            actual = manifest_lib.file_of(on_disk)
        except OSError as error:
            found.append(_damage(save, path, error.strerror or str(error)))
            continue
        if actual.size != wanted.size:
            text = f"{actual.size} bytes, {wanted.size} were written"
            found.append(_damage(save, path, text))
        elif actual != wanted:
            found.append(_damage(save, path, "wrong checksum"))
    return found


def require_undamaged(save: Saved, parts: Collection[int]) -> None:
    """Raises:
    ConfigError: files with the variables of these parts are not as they were written.
    """
    for damage in verify(save, parts):
        file = str(save.directory / damage.path)
        raise ConfigError(
            f"a file of a checkpoint is damaged: file={file!r} {damage.text}; damaged"
            f" variables: {list(damage.variables[:5]) or 'unknown'}; take another"
            " checkpoint by its prefix, or bring the file back from a copy"
        )


def _is_in(save: Saved, path: str, parts: Collection[int]) -> bool:
    match = _OF_PART.match(path)
    prefixes = [save.prefix(part) for part in parts]
    return match is not None and save.directory / match["prefix"] in prefixes


def _damage(save: Saved, path: str, text: str) -> Damage:
    match = _OF_PART.match(path)
    if match is None:
        return Damage(path, text)
    return Damage(path, text, _unreadable(save, save.directory / match["prefix"]))


def _unreadable(save: Saved, prefix: pathlib.Path) -> tuple[str, ...]:
    """TensorFlow has a checksum for each value."""
    names = [
        name
        for name, entry in sorted(save.manifest.entries.items())
        if save.prefix(entry.mp_rank) == prefix
    ]
    try:
        reader = tf.train.load_checkpoint(str(prefix))
    except READ_ERRORS:
        return tuple(names)
    found = []
    for name in names:
        try:
            reader.get_tensor(name)
        except READ_ERRORS:
            found.append(name)
    return tuple(found)
