"""The files of a save, for every rank: found, compared with their checksums, and
brought to the ranks whose host does not have them."""

import contextlib
import pathlib
import re
import tempfile
from collections.abc import Iterator, Sequence
from typing import IO

import tensorflow as tf

from smp_tf.checkpoint import manifest as manifest_lib
from smp_tf.checkpoint.bundle import READ_ERRORS
from smp_tf.checkpoint.folder import Folder
from smp_tf.checkpoint.manifest import Manifest
from smp_tf.checkpoint.together import attempt, everywhere, portable, raise_first
from smp_tf.errors import ConfigError, SmpError
from smp_tf.runtime import session

_CHUNK_BYTES = 2**24

_ITERATORS = re.compile(r"\.rank_\d+\.iterators\.[^/]*$")

_REMEDY = (
    "restore another checkpoint by its restore_prefix, or bring the file back from a"
    " copy"
)


class Files:
    """Where this rank reads the files of a save. All ranks make one together.

    Args:
        with_iterators: also the states of iterators, which belong to a rank.

    Raises:
        ConfigError: on every rank, a file is missing, too short or damaged.
        SmpError: on every rank, files could not be brought here.
    """

    def __init__(
        self, folder: Folder, manifest: Manifest, with_iterators: bool
    ) -> None:
        self._folder, self._manifest = folder, manifest
        self._copies: tempfile.TemporaryDirectory[str] | None = None
        self._files = sorted(
            path
            for path in manifest.files
            if with_iterators or not _ITERATORS.search(path)
        )
        self._seen = everywhere("restore: look for files", self._visible)
        for path in self._files:
            if not any(path in seen for seen in self._seen):
                raise ConfigError(
                    f"a file of a checkpoint is missing: file={self._path(path)!r};"
                    f" {_REMEDY}"
                )
        everywhere("restore: verify", self._verify)
        self._lacking = [
            {_part_of(path) for path in self._files if path not in seen}
            for seen in self._seen
        ]
        if any(self._lacking):
            try:
                self._bring()
            except BaseException:
                self.close()
                raise

    def _path(self, path: str) -> str:
        return str(self._folder.directory / path)

    def _visible(self) -> frozenset[str]:
        directory = self._folder.directory
        return frozenset(path for path in self._files if (directory / path).is_file())

    def prefix(self, mp_rank: int) -> pathlib.Path:
        """Of the files of a part."""
        own = self._folder.prefix(mp_rank, self._manifest.number)
        if self._copies is None or not self._needs(session.rank(), own.parent.name):
            return own
        return pathlib.Path(self._copies.name) / own.parent.name / own.name

    def _needs(self, rank: int, part: str) -> bool:
        return part in self._lacking[rank]

    def close(self) -> None:
        """Remove copies: nothing more is read."""
        if self._copies is not None:
            self._copies.cleanup()

    # --- checksums

    def _verify(self) -> None:
        """Each file is read by one of the ranks that see it."""
        for index, path in enumerate(self._files):
            seers = [rank for rank, seen in enumerate(self._seen) if path in seen]
            if seers[index % len(seers)] == session.rank():
                self._verify_file(path)

    def _verify_file(self, path: str) -> None:
        wanted = self._manifest.files[path]
        on_disk = self._folder.directory / path
        size = on_disk.stat().st_size
        where = f"file={str(on_disk)!r}"
        if size != wanted.size:
            raise ConfigError(
                f"a file of a checkpoint was cut or changed: {where} bytes={size} of"
                f" {wanted.size}; {_REMEDY}"
            )
        if manifest_lib.file_of(on_disk) != wanted:
            damaged = self._damaged(path)
            raise ConfigError(
                f"a file of a checkpoint is damaged: {where} wrong checksum; damaged"
                f" variables: {damaged or 'unknown'}; {_REMEDY}"
            )

    def _damaged(self, path: str) -> list[str]:
        """The variables that TensorFlow cannot read from the part of a file."""
        prefix = re.sub(r"\.(index|data-\d+-of-\d+)$", "", path)
        found = []
        with contextlib.suppress(*READ_ERRORS):
            reader = tf.train.load_checkpoint(self._path(prefix))
            for name in sorted(reader.get_variable_to_shape_map()):
                try:
                    reader.get_tensor(name)
                except READ_ERRORS:
                    found.append(name)
        return found[:5]

    # --- copies, where the directory is not shared

    def _bring(self) -> None:
        """Each rank copies the parts that it does not see as a whole."""
        everywhere("restore: make room", self._make_room)
        for path in self._files:
            sender = next(rank for rank, seen in enumerate(self._seen) if path in seen)
            takers = [
                rank
                for rank in range(session.size())
                if self._needs(rank, _part_of(path))
            ]
            if not takers:
                continue
            error = None
            if session.rank() in (sender, *takers):
                _, error = attempt(lambda: self._copy(path, sender, takers))
            errors = session.allgather(portable(error), session.WORLD)
            raise_first(errors, error)

    def _make_room(self) -> None:
        needed = self._lacking[session.rank()]
        if needed:
            self._copies = tempfile.TemporaryDirectory(prefix="smp-checkpoint-")
            for part in needed:
                pathlib.Path(self._copies.name, part).mkdir()

    def _copy(self, path: str, sender: int, takers: Sequence[int]) -> None:
        """What a sender and those who take a file do. To the end, whatever happens: the
        others wait."""
        failure: Exception | None = None
        with contextlib.ExitStack() as stack:
            target: IO[bytes] | None = None
            if session.rank() in takers:
                assert self._copies is not None
                copy = pathlib.Path(self._copies.name, path)
                stack.enter_context(manifest_lib.naming(copy))
                target, failure = attempt(lambda: stack.enter_context(copy.open("wb")))
            for chunk in self._chunks(path, sender, takers):
                if target is not None and failure is None:
                    _, failure = attempt(lambda: target.write(chunk))
            if failure is not None:
                raise failure

    def _chunks(
        self, path: str, sender: int, takers: Sequence[int]
    ) -> Iterator[bytes]:
        if session.rank() == sender:
            yield from self._sent(path, [rank for rank in takers if rank != sender])
            return
        while True:
            chunk, error = session.recv_from(sender, session.WORLD_RANK)
            if error is not None:
                raise SmpError(f"rank {sender}: {error[1]}")
            if not chunk:
                return
            yield chunk

    def _sent(self, path: str, others: Sequence[int]) -> Iterator[bytes]:
        with contextlib.ExitStack() as stack:
            file, error = attempt(
                lambda: stack.enter_context(pathlib.Path(self._path(path)).open("rb"))
            )
            chunk: bytes | None = None
            while True:
                if error is None:
                    chunk, error = attempt(lambda: file.read(_CHUNK_BYTES))
                for rank in others:
                    told = (chunk, portable(error))
                    session.send(told, rank, session.WORLD_RANK)
                if error is not None:
                    raise error
                if not chunk:
                    return
                yield chunk


def _part_of(path: str) -> str:
    return path.partition("/")[0]


def same_manifest(found: Sequence[Manifest | None], save_id: str) -> Manifest:
    """That of a save, from what each rank has read."""
    return next(each for each in found if each is not None and each.save_id == save_id)
