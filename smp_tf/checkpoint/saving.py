"""One save, from the values to the manifest.

    prepare   all ranks: who has what; room for the files        messages
    write     each its files; on a thread if training goes on    none
    commit    all files are there: manifests                     messages
    clean up  files of saves that are no longer kept go          messages

Whatever happens before the manifests are in all folders, the previous save stays the
latest.
"""

import contextlib
import threading
import uuid
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from smp_tf.checkpoint import manifest as manifest_lib
from smp_tf.checkpoint import parts, rank_state
from smp_tf.checkpoint.choosing import Save, lost_numbers, whole_saves
from smp_tf.checkpoint.folder import Folder, Seen
from smp_tf.checkpoint.manifest import File, Layout, Manifest
from smp_tf.checkpoint.names import Contents, trained_names
from smp_tf.checkpoint.restoring import Restoring
from smp_tf.checkpoint.together import attempt, everywhere
from smp_tf.errors import ConfigError, SmpError, TransportError
from smp_tf.runtime import session


def layout() -> Layout:
    """Of the job that this process is in."""
    return Layout(
        mp_size=session.mp_size(),
        pp_size=session.pp_size(),
        dp_size=session.dp_size(),
        sharded=session.config().shard_optimizer_state,
    )


class Saving:
    """A save that is under way. Every rank makes the same calls.

    Args:
        number: of the checkpoint; None for the next one.
        step: value of the step counter.
        blocking: False to write on a thread; the values are copied here and now.
        restoring: the restore before, if any.

    Raises:
        ConfigError: there is a checkpoint of this number, or something in the contents
            cannot be saved.
        SmpError: on every rank, what went wrong on any of them.
    """

    def __init__(
        self,
        folder: Folder,
        contents: Contents,
        number: int | None,
        step: int | None,
        blocking: bool,
        restoring: Restoring | None = None,
    ) -> None:
        self._folder, self._contents, self._step = folder, contents, step
        variables = parts.here(contents.variables)

        def own() -> tuple[str, list[Seen], parts.Known]:
            contents.require_savable()
            if restoring is not None:
                restoring.require_placed()
            return uuid.uuid4().hex, folder.scan(), parts.known(variables)

        found = everywhere(f"save({'' if number is None else number})", own)
        self._save_id = found[0][0]
        self._seen = [each for _, seen, _ in found for each in seen]
        self.number = _number_of(folder, self._seen, number)
        self._order = max((each.order for each in self._seen), default=-1) + 1
        self._prefix = folder.prefix(session.mp_rank(), self.number)
        self._parts = parts.divide([each for _, _, each in found])
        if restoring is not None:
            restoring.require_slots(self._parts.entries)
        everywhere("save: make room", self._make_room)
        self._error: Exception | None = None
        self._thread: threading.Thread | None = None
        self._begin(variables, blocking)

    def _make_room(self) -> None:
        manifest_lib.make_folder(self._prefix.parent)
        for part in self._own_parts():  # what a killed job has left
            self._folder.remove(part, self.number)

    def _own_parts(self) -> list[int]:
        """The folders that this rank cleans: of more parts if there were more."""
        if not parts.is_writer():
            return []
        every = {*self._folder.parts(), session.mp_rank()}
        size = session.mp_size()
        return sorted(k for k in every if k % size == session.mp_rank())

    def _begin(self, variables: Mapping[str, Any], blocking: bool) -> None:
        own_prefix = rank_state.prefix_of(self._prefix, session.rank())
        iterators, models = self._contents.iterators, self._contents.models
        _, self._error = attempt(
            lambda: rank_state.write(own_prefix, iterators, models)
        )
        if not parts.is_writer():
            parts.provide(self._parts, variables)
            return
        values = parts.values(self._parts, variables)
        if blocking:
            self._run(lambda: parts.write(self._prefix, values))
            return
        copies = iter([(name, _copied(value), error) for name, value, error in values])
        self._thread = threading.Thread(
            target=self._run,
            args=[lambda: parts.write(self._prefix, copies)],
            name="smp-checkpoint",
            daemon=True,
        )
        self._thread.start()

    def _run(self, function: Callable[[], None]) -> None:
        _, error = attempt(function)
        self._error = self._error or error

    def commit(self, max_to_keep: int | None) -> list[Save]:
        """Wait for the files, and make the save count; the whole saves to be kept.

        Raises:
            SmpError: on every rank, what went wrong on any of them; the previous save
                is the latest.
        """
        if self._thread is not None:
            self._thread.join()
        try:
            files = everywhere("save: write", self._files)
            manifest = self._manifest(files)
            everywhere("save: commit", lambda: self._write_manifest(manifest))
        except TransportError:
            # A rank failed in the middle of it. Others may have heard that the save is
            # whole, and remove the older ones: what is left of this one must stay.
            raise
        except BaseException:  # all ranks have heard that it is not
            self._remove()
            raise
        whole = whole_saves(self._seen)
        kept = [*whole, Save(self.number, self._order, self._save_id)]
        return kept[-max_to_keep:] if max_to_keep else kept

    def clean_up(self, kept: Collection[Save]) -> None:
        """Remove the files of saves that are not kept, and of those that were never
        whole. After ``commit``.

        Raises:
            SmpError: on every rank, what could not be removed on any of them. The save
                counts nevertheless.
        """
        numbers = [save.number for save in kept]
        lost = lost_numbers(self._seen)
        gone = {each.number for each in self._seen} - lost - {*numbers}
        # First all folders say which saves there are: what one of them names while it
        # is gone from another was not removed by a clean-up that was interrupted.
        everywhere("save: declare", lambda: self._declare(numbers, lost))
        everywhere("save: clean up", lambda: self._sweep(gone))

    def _files(self) -> dict[str, File]:
        """This rank's files, by path in the directory."""
        if self._error is not None:
            raise self._error
        own = rank_state.files_of(rank_state.prefix_of(self._prefix, session.rank()))
        if parts.is_writer():
            own += parts.files_of(self._prefix)
            manifest_lib.sync_folder(self._prefix.parent)
        directory = self._folder.directory
        return {
            path.relative_to(directory).as_posix(): manifest_lib.file_of(path)
            for path in own
        }

    def _manifest(self, files: list[dict[str, File]]) -> Manifest:
        return Manifest(
            save_id=self._save_id,
            number=self.number,
            order=self._order,
            step=self._step,
            layout=layout(),
            entries=self._parts.entries,
            files={path: file for each in files for path, file in each.items()},
            trained=trained_names(self._contents),
        )

    def _write_manifest(self, manifest: Manifest) -> None:
        if parts.is_writer():
            path = self._folder.manifest_path(session.mp_rank(), self.number)
            manifest_lib.write_text(path, manifest.to_json())

    def _remove(self) -> None:
        """Take back a save that failed."""
        if parts.is_writer():
            with contextlib.suppress(OSError):
                self._folder.remove(session.mp_rank(), self.number)

    def _declare(self, numbers: list[int], lost: Collection[int]) -> None:
        has_files = {each.number for each in self._seen if each.has_files}
        with self._cleaning():
            for part in self._own_parts():
                before = self._folder.committed(part)
                here = [n for n in before if n in lost and n in has_files]
                here += [
                    number
                    for number in numbers
                    if self._folder.manifest_path(part, number).exists()
                ]
                self._folder.declare(part, here)

    def _sweep(self, gone: Collection[int]) -> None:
        with self._cleaning():
            for part in self._own_parts():
                for number in sorted(gone):
                    self._folder.remove(part, number)

    @contextlib.contextmanager
    def _cleaning(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise SmpError(
                f"a checkpoint is whole: {self._folder.name}-{self.number}, but the"
                f" clean-up after it failed: {error}; free space, or allow writing: the"
                " next save does it"
            ) from error


def _number_of(folder: Folder, seen: Collection[Seen], number: int | None) -> int:
    numbers = {save.number for save in whole_saves(seen)} | lost_numbers(seen)
    if number is None:
        return max(numbers, default=0) + 1
    has_files = {each.number for each in seen if each.has_files}
    if number in numbers & has_files:
        raise ConfigError(
            "a checkpoint is never overwritten, for a job that is killed meanwhile"
            f" would lose it: checkpoint_number={number}"
            f" directory={str(folder.directory)!r}; give another number, or remove the"
            f" files {folder.name}-{number}.* first"
        )
    return number


def _copied(value: Any) -> Any:
    """Bytes, the value of a text, do not change."""
    return value.copy() if hasattr(value, "copy") else value
