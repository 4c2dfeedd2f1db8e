"""A folder that is written as a whole, or stays as it was.

    new      written beside its place, and renamed
    exists   written into ``<folder>/.new-..``, entries renamed; also into a folder that
             is a mount point, and among files of others, which stay
"""

import contextlib
import uuid
from collections.abc import Callable, Iterator, Sequence

import tensorflow as tf

_files = tf.io.gfile


@contextlib.contextmanager
def replaced_folder(path: str, entries: Sequence[str], last: str) -> Iterator[str]:
    """Write a folder; in ``path`` it is when the block has ended well.

    A process that is killed leaves the old content, or the new, or for the time of a
    few renames a folder without ``last``; and its ``.new-..`` folder.

    Args:
        path: on any file system of TensorFlow.
        entries: names that the content may have; old ones of these go.
        last: the one without which nobody reads the others.

    Yields:
        The folder to write to; it is empty.

    Raises:
        tf.errors.OpError: it cannot be written; what was there is there.
    """
    work = f"{path.rstrip('/')}.new-{uuid.uuid4().hex[:8]}"
    exists = _files.isdir(path)
    if exists:
        work = _files.join(path, f".new-{work[-8:]}")
    new, old = _files.join(work, "new"), _files.join(work, "old")
    try:
        _files.makedirs(new)
        yield new
        if exists:
            _files.makedirs(old)
            _exchange(path, new, old, entries, last)
        else:
            _files.rename(new, path)
    finally:
        with contextlib.suppress(tf.errors.OpError):
            _files.rmtree(work)


def _exchange(
    path: str, new: str, old: str, entries: Sequence[str], last: str
) -> None:
    """Renames that are taken back if one fails."""
    moved: list[Callable[[], None]] = []

    def move(name: str, source: str, target: str) -> None:
        places = _files.join(source, name), _files.join(target, name)
        if _files.exists(places[0]):
            _files.rename(*places)
            moved.append(lambda: _files.rename(places[1], places[0]))

    names = [name for name in entries if name != last]
    try:
        for name in (last, *names):
            move(name, path, old)
        for name in (*names, last):
            move(name, new, path)
    except BaseException:
        for undo in reversed(moved):
            undo()
        raise
