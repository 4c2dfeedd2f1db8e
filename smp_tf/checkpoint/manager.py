"""``smp.CheckpointManager``: saves and restores the whole model, in parts."""

import re
from typing import Any

from smp_tf.checkpoint import rank_state
from smp_tf.checkpoint.choosing import chosen, whole_saves
from smp_tf.checkpoint.folder import Folder, Seen
from smp_tf.checkpoint.manifest import Manifest
from smp_tf.checkpoint.names import Contents, contents_of
from smp_tf.checkpoint.reading import Files, same_manifest
from smp_tf.checkpoint.restoring import Restoring, Values
from smp_tf.checkpoint.saving import Saving, layout
from smp_tf.checkpoint.together import everywhere, require_same
from smp_tf.errors import ConfigError
from smp_tf.runtime import session

_PREFIX = re.compile(r"^(?:(?P<directory>.*)/)?(?P<name>[^/]+)-(?P<number>\d+)$")
_PART = re.compile(r"(^|/)mp_rank_\d+$")


class CheckpointManager:
    """Saves a ``tf.train.Checkpoint`` of a model that is spread over several ranks.

        checkpoint = tf.train.Checkpoint(optimizer=optimizer, model=model)
        manager = smp.CheckpointManager(checkpoint, "/opt/ml/checkpoints")
        manager.restore()                     # the latest, if there is one
        ..
        manager.save()                        # <directory>/mp_rank_<k>/ckpt-1

    Every rank of the job makes the same calls, also the constructor. A save is all or
    nothing: a job that is killed meanwhile leaves the one before as the latest. It
    restores into any number of partitions and replicas, also into a plain Keras model
    in one process.

    The names of variables are the paths that lead to them from the checkpoint; see
    ``smp_tf.checkpoint.names``. What the random operations of a model's steps count
    with (a Dropout) belongs to the model. States of random generators, and iterators in
    the checkpoint, belong to a rank: they are restored if the job has the same layout.

    Args:
        checkpoint: what is saved.
        directory: of all parts; made if it is not there. The hosts need not share it
            as long as the ranks stay on their hosts.
        max_to_keep: older saves are removed from all parts; None for all.
        checkpoint_name: ``ckpt`` in ``ckpt-1``.
        step_counter: a variable or a number; for ``checkpoint_interval``, and written
            into the manifest.
        checkpoint_interval: ``save`` does nothing before the step counter has grown by
            so much since the last one.

    Raises:
        ConfigError: on every rank: an argument is not as above, or not the same on all
            ranks.
        TransportError: a rank failed, or did not come within timeout_s.
    """

    def __init__(
        self,
        checkpoint: Any,
        directory: str = "/opt/ml/checkpoints",
        max_to_keep: int | None = None,
        checkpoint_name: str = "ckpt",
        step_counter: Any = None,
        checkpoint_interval: int | None = None,
    ) -> None:
        session.current("CheckpointManager")
        arguments = {
            "directory": str(directory),
            "checkpoint_name": checkpoint_name,
            "max_to_keep": max_to_keep,
            "checkpoint_interval": checkpoint_interval,
        }

        def check() -> tuple[dict[str, Any], list[Seen]]:
            _check_arguments(
                max_to_keep, checkpoint_name, step_counter, checkpoint_interval
            )
            return arguments, Folder(str(directory), checkpoint_name).scan()

        found = everywhere("CheckpointManager", check)
        require_same("CheckpointManager", [each for each, _ in found])
        self._checkpoint = checkpoint
        self._folder = Folder(str(directory), checkpoint_name)
        self._max_to_keep, self._interval = max_to_keep, checkpoint_interval
        self._step_counter = step_counter
        self._last_step: int | None = None
        self._saving: Saving | None = None
        self._restoring: Restoring | None = None
        self._saves = whole_saves(each for _, seen in found for each in seen)

    def _contents(self) -> Contents:
        return contents_of(self._checkpoint)

    # --- what there is

    @property
    def checkpoint(self) -> Any:
        """The ``tf.train.Checkpoint``."""
        return self._checkpoint

    @property
    def directory(self) -> str:
        """The directory of all parts."""
        return str(self._folder.directory)

    @property
    def checkpoints(self) -> list[str]:
        """Prefixes of this rank's part of the whole saves, the latest last."""
        return [self._prefix(save.number) for save in self._saves]

    @property
    def latest_checkpoint(self) -> str | None:
        """Prefix of this rank's part of the latest whole save; None without one."""
        return self._prefix(self._saves[-1].number) if self._saves else None

    @property
    def checkpoint_interval(self) -> int | None:
        """Steps from one save to the next; None if every call saves."""
        return self._interval

    @property
    def step_counter(self) -> Any:
        """As given."""
        return self._step_counter

    def _prefix(self, number: int) -> str:
        return str(self._folder.prefix(session.mp_rank(), number))

    def _step(self) -> int | None:
        return None if self._step_counter is None else int(self._step_counter)

    # --- save

    def save(
        self,
        checkpoint_number: int | None = None,
        blocking: bool = True,
        check_interval: bool = True,
    ) -> str | None:
        """Save all variables that the checkpoint leads to, of all partitions.

        Args:
            checkpoint_number: the n of ``ckpt-n``; by default the next one.
            blocking: False to return when the values are copied. The files are written
                meanwhile; they count from the next call of this manager on, or
                ``wait``, or ``smp.shutdown``, which raise what went wrong. At the end
                of the script it is logged, the exit code is 1, and ranks wait for each
                other for 30 s only.
            check_interval: whether ``checkpoint_interval`` holds for this call.

        Returns:
            Prefix of this rank's part; None if nothing was saved, because of the
            interval.

        Raises:
            ConfigError: on every rank: there is a checkpoint of this number, or the
                ``tf.train.Checkpoint`` leads to what cannot be saved.
            SmpError: on every rank: a rank could not write, or variables wait for
                their values since a restore. The earlier checkpoints are as they were.
            TransportError: a rank failed, or did not come within timeout_s.
        """
        self.wait()
        step = self._step()
        if check_interval and self._is_early(step):
            return None
        self._saving = Saving(
            self._folder,
            self._contents(),
            checkpoint_number,
            step,
            blocking,
            self._restoring,
        )
        number = self._saving.number
        self._last_step = step
        if blocking:
            self.wait()
        else:
            session.call_last(self.wait)
        return self._prefix(number)

    def _is_early(self, step: int | None) -> bool:
        if self._interval is None or self._last_step is None or step is None:
            return False
        return step < self._last_step + self._interval

    def wait(self) -> None:
        """Return when the save that is under way is whole; at once without one.

        Raises:
            SmpError: on every rank, what went wrong on any of them; the checkpoint
                before it is the latest.
            TransportError: a rank failed, or did not come within timeout_s.
        """
        saving, self._saving = self._saving, None
        if saving is not None:
            session.call_no_more(self.wait)
            self._saves = saving.commit(self._max_to_keep)
            saving.clean_up(self._saves)

    # --- restore

    def restore(self, restore_prefix: str | None = None) -> str | None:
        """Restore a checkpoint, before or after the first step.

        All files are verified first; if anything is wrong, no variable is changed.
        Before the first step, variables get their values when a step has partitioned
        the model, and slots when the optimizer makes them.

        Args:
            restore_prefix: ``ckpt-3``, or with the directory in front, or the prefix
                of a part, as ``checkpoints`` has them; by default the latest.

        Returns:
            Prefix of this rank's part; None if the directory has no checkpoint yet.

        Raises:
            ConfigError: on every rank: there is no such checkpoint, a file is missing
                or damaged, or the variables are not those of the checkpoint.
            TransportError: a rank failed, or did not come within timeout_s.
        """
        self.wait()
        folder, number = self._named(restore_prefix)
        found = everywhere(f"restore({restore_prefix or ''})", folder.scan)
        seen = [each for every in found for each in every]
        save = chosen(folder, seen, number)
        if save is None:
            return None
        manifests = everywhere(
            "restore: read the manifest", lambda: folder.manifest(save.number)
        )
        manifest = same_manifest(manifests, save.save_id)
        is_alike = manifest.layout.is_like(layout())
        files = Files(folder, manifest, with_iterators=is_alike)
        try:
            self._restore_from(files, manifest, is_alike)
        except BaseException:
            files.close()
            raise
        self._last_step = manifest.step
        return str(folder.prefix(session.mp_rank(), save.number))

    def _restore_from(self, files: Files, manifest: Manifest, is_alike: bool) -> None:
        values = Values(manifest, files.prefix)
        states: list[rank_state.RandomStates] = []
        restoring = Restoring(
            values, self._contents, lambda: _take_over_graphs(states), files.close
        )
        own = rank_state.prefix_of(files.prefix(session.mp_rank()), session.rank())
        replica = rank_state.of_replica(manifest.files, session.dp_rank())
        counters: list[rank_state.Counters | None] = []

        def verify() -> None:
            restoring.verify()
            counters.append(
                rank_state.counters_in(
                    rank_state.prefix_of(files.prefix(mp_rank), rank)
                    for mp_rank, rank in replica
                )
            )
            if is_alike:
                states.append(rank_state.RandomStates(own))
                rank_state.check_iterators(own, self._contents().iterators)

        everywhere("restore: compare the variables", verify)
        if is_alike:
            # TensorFlow finds out only now whether they are of the same datasets.
            iterators = self._contents().iterators
            everywhere(
                "restore: set the iterators",
                lambda: rank_state.restore_iterators(own, iterators),
            )

        def begin() -> None:
            if self._restoring is not None:
                self._restoring.end()
            self._restoring = restoring
            restoring.begin()
            now = self._contents()
            rank_state.take_over_counters(counters[0], now.models)
            if is_alike:
                states[0].take_over()

        everywhere("restore: set the variables", begin)

    def _named(self, restore_prefix: str | None) -> tuple[Folder, int | None]:
        if restore_prefix is None:
            return self._folder, None
        match = _PREFIX.match(str(restore_prefix))
        if match is None:
            raise ConfigError(
                "restore_prefix is the name of a checkpoint with its number, with or"
                f" without the directory: restore_prefix={restore_prefix!r}; such as"
                f" {self._folder.name}-1; there are: {self.checkpoints}"
            )
        directory = match["directory"]
        directory = self.directory if directory is None else _PART.sub("", directory)
        return Folder(directory, match["name"]), int(match["number"])


def _take_over_graphs(states: list[rank_state.RandomStates]) -> None:
    for each in states:
        each.take_over_graphs()


def _check_arguments(
    max_to_keep: int | None, name: str, step_counter: Any, interval: int | None
) -> None:
    for key, value in (("max_to_keep", max_to_keep), ("checkpoint_interval", interval)):
        is_int = isinstance(value, int) and not isinstance(value, bool)
        if value is not None and not (is_int and value > 0):
            raise ConfigError(
                f"`{key}` is a number, at least 1, or None: CheckpointManager"
                f" {key}={value!r}"
            )
    if not isinstance(name, str) or not name or "/" in name:
        raise ConfigError(
            "`checkpoint_name` is the name of a file: CheckpointManager"
            f" checkpoint_name={name!r}"
        )
    if interval is not None and step_counter is None:
        raise ConfigError(
            "`checkpoint_interval` needs a step_counter: CheckpointManager"
            f" checkpoint_interval={interval}"
        )
