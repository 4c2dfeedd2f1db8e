"""Values of a save, on their way into variables.

Each rank takes what it has variables for, whichever part that is in. Variables that do
not exist yet, or whose rank is not known yet, get their values later:

    variables of a DistributedModel     when a step has partitioned it
    slots of an optimizer               when it makes them, before they are used
"""

import pathlib
from collections.abc import Callable, Collection, Mapping
from typing import Any

import tensorflow as tf

from smp_tf.checkpoint import names, parts
from smp_tf.checkpoint.bundle import READ_ERRORS, text_of
from smp_tf.checkpoint.manifest import Manifest
from smp_tf.checkpoint.names import Contents
from smp_tf.errors import ConfigError, SmpError
from smp_tf.frontend.hooks import optimizer_slots


class Values:
    """Reads the values of a save, one by one.

    Args:
        prefix_of: mp_rank -> prefix of the files of its part.
    """

    def __init__(
        self, manifest: Manifest, prefix_of: Callable[[int], pathlib.Path]
    ) -> None:
        self.manifest, self._prefix_of = manifest, prefix_of

    def read(self, name: str) -> tf.Tensor:
        """A tensor that a variable can take as it is: no copy is made of it.

        Raises:
            ConfigError: the file is damaged, or gone.
        """
        entry = self.manifest.entries[name]
        prefix = str(self._prefix_of(entry.mp_rank))
        try:
            with tf.init_scope(), tf.device("CPU:0"):
                (value,) = tf.raw_ops.RestoreV2(
                    prefix=prefix,
                    tensor_names=[name],
                    shape_and_slices=[""],
                    dtypes=[entry.dtype],
                )
            return value
        except READ_ERRORS as error:
            raise ConfigError(
                f"a checkpoint's file is damaged: file={prefix!r} variable={name!r}:"
                f" {text_of(error)}; restore another checkpoint by its restore_prefix,"
                " or bring the file back from a copy"
            ) from error


class Restoring:
    """One restore, until every variable has its value.

    Args:
        contents: gives what the checkpoint leads to now.
        when_placed: called once all models are partitioned, if any was not.
        when_read: called when no more values are read, at least once.
    """

    def __init__(
        self,
        values: Values,
        contents: Callable[[], Contents],
        when_placed: Callable[[], None],
        when_read: Callable[[], None],
    ) -> None:
        self._values, self._contents = values, contents
        self._when_placed, self._when_read = when_placed, when_read
        self._unmade: set[str] = set()  # optimizers that will make slots
        now = contents()
        entries = values.manifest.entries
        self._left = {name for name in entries if names.root_of(name) in now.roots}
        self._is_over = False

    def verify(self) -> None:
        """Whether the checkpoint has these variables, no others, of these shapes.

        Raises:
            ConfigError: names each that does not fit.
        """
        now = self._contents()
        for optimizer in now.optimizers.values():
            optimizer_slots.make_scalars(optimizer)
        self._require_alike(self._contents())

    def _require_alike(self, now: Contents, beginning: str = "") -> None:
        """Of the variables with names that begin so."""
        variables = {
            name: variable
            for name, variable in now.variables.items()
            if name.startswith(beginning)
        }
        wrong = [
            *self._of_other_shape(variables),
            *self._without_value(variables),
            *self._without_variable(now),
            *self._without_slot(now),
        ]
        if wrong:
            raise self._mismatch(wrong)

    def _of_other_shape(self, variables: Mapping[str, Any]) -> list[str]:
        entries = self._values.manifest.entries
        wrong = []
        for name, (shape, dtype) in parts.known(variables).items():
            entry = entries.get(name)
            if entry is not None and (entry.shape, entry.dtype) != (shape, dtype):
                wrong.append(
                    f"variable={name!r} is {shape} {dtype}, in the checkpoint"
                    f" {entry.shape} {entry.dtype}"
                )
        return wrong

    def _without_value(self, variables: Mapping[str, Any]) -> list[str]:
        entries = self._values.manifest.entries
        return [
            f"variable={name!r} is not in the checkpoint"
            for name in variables
            if name not in entries
        ]

    def _without_variable(self, now: Contents) -> list[str]:
        later = tuple(f"{path}/" for path in (*now.optimizers, *_unbuilt(now)))
        return [
            f"variable={name!r} of the checkpoint does not exist"
            for name in sorted(self._left - now.variables.keys())
            if not name.startswith(later)
        ]

    def _without_slot(self, now: Contents) -> list[str]:
        """An optimizer that has some slots of a variable has all of them."""
        wrong = []
        for path in now.optimizers:
            beginning = f"{path}/{names.SLOT}/"
            own = [name for name in now.variables if name.startswith(beginning)]
            have = {_of_slot(name, beginning) for name in own}
            wrong += [
                f"variable={name!r} of the checkpoint does not exist"
                for name in sorted(self._left - now.variables.keys())
                if name.startswith(beginning) and _of_slot(name, beginning) in have
            ]
        return wrong

    def _mismatch(self, wrong: list[str]) -> ConfigError:
        shown = "; ".join(wrong[:5]) + ("; .." if len(wrong) > 5 else "")
        file = self._values.manifest.number
        return ConfigError(
            "the objects in tf.train.Checkpoint must be those that were saved:"
            f" {len(wrong)} variables differ: checkpoint number={file}: {shown}; build"
            " the model as it was (a plain Keras model before the restore), and leave"
            " out of tf.train.Checkpoint what shall not be restored"
        )

    def begin(self) -> None:
        """Set what exists; see to it that the rest follows."""
        now = self._contents()
        for path, optimizer in now.optimizers.items():
            if self._has_unmade(path, now):
                self._unmade.add(path)
                again = self._made(path, optimizer_slots.is_legacy(optimizer))
                optimizer_slots.after_making(optimizer, again)
        self._set()
        waiting = [model for model in now.models.values() if model.placement is None]
        for model in waiting:
            model.when_placed(self._placed)
        self._end_reading()

    def _end_reading(self) -> None:
        if not self._unmade and not _unplaced(self._contents()):
            self._when_read()

    def _has_unmade(self, path: str, now: Contents) -> bool:
        """Whether an optimizer has yet to make variables that it has in the file."""
        left = {name for name in self._left if name.startswith(f"{path}/")}
        is_made = _has_slots(path, now.variables)
        return bool(left - now.variables.keys()) and not is_made

    def _made(self, path: str, is_legacy: bool) -> Callable[[], bool]:
        def made() -> bool:
            if not self._is_over:
                self._set()
                self._require_alike(self._contents(), f"{path}/")
            # A legacy one makes the slots of those variables that it updates.
            if not (self._is_over or not is_legacy or self._has_all_slots(path)):
                return False
            self._unmade.discard(path)
            self._end_reading()
            return True

        return made

    def _has_all_slots(self, path: str) -> bool:
        """That are in the checkpoint for variables of this rank."""
        mine = parts.here(self._contents().variables)
        beginning = f"{path}/{names.SLOT}/"
        return not any(
            name.startswith(beginning) and _of_slot(name, beginning) in mine
            for name in self._left
        )

    def _placed(self) -> None:
        now = self._contents()
        if self._is_over or _unplaced(now):
            return
        self._set()
        self._require_alike(now)
        self._when_placed()
        self._end_reading()

    def _set(self) -> None:
        now = self._contents()
        waiting = tuple(f"{path}/" for path in _unplaced(now))
        mine = parts.here(now.variables)
        for name in now.variables:
            if name not in self._left or (waiting and name.startswith(waiting)):
                continue
            if name in mine:
                mine[name].assign(self._values.read(name))
            self._left.discard(name)

    def require_placed(self) -> None:
        """Raises:
        SmpError: variables of models still wait for their values.
        """
        waiting = _unplaced(self._contents())
        if not self._is_over and waiting:
            raise _too_early(waiting)

    def require_slots(self, entries: Mapping[str, Any]) -> None:
        """Slots of each optimizer that has some in the checkpoint are in ``entries``,
        the variables of all ranks.

        Raises:
            SmpError: an optimizer has none: they still wait for their values.
        """
        waiting = [
            path
            for path in self._contents().optimizers
            if not self._is_over
            and _has_slots(path, self._values.manifest.entries)
            and not _has_slots(path, entries)
        ]
        if waiting:
            raise _too_early(waiting)

    def end(self) -> None:
        """Nothing more is set: another restore follows."""
        self._is_over = True
        self._when_read()


def _unplaced(now: Contents) -> list[str]:
    return [path for path, model in now.models.items() if model.placement is None]


def _unbuilt(now: Contents) -> list[str]:
    return [path for path in _unplaced(now) if not now.models[path].built]


def _has_slots(path: str, variables: Collection[str]) -> bool:
    return any(name.startswith(f"{path}/{names.SLOT}/") for name in variables)


def _of_slot(name: str, beginning: str) -> str:
    """The variable that a slot belongs to."""
    return name.removeprefix(beginning).partition("/")[2]


def _too_early(waiting: list[str]) -> SmpError:
    return SmpError(
        "a save comes after the first step that follows a restore, when the restored"
        f" values are in their variables: waiting={waiting}"
    )
