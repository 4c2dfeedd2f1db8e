"""The folder of ``BackupAndRestore``.

    backup_dir/
      rank_0/step_120/state.index, state.data-..    what rank 0 has
             step_120/done.json                     written last: the backup is whole
      rank_1/step_120/..

A new backup is written next to the previous one, which goes when all ranks have the new
one: whenever a rank dies, there is one that all of them have.
"""

import dataclasses
import json
import re
from typing import Any

import tensorflow as tf

from smp_tf.errors import ConfigError

_STEP = re.compile(r"step_(\d+)/?$")


@dataclasses.dataclass(frozen=True)
class Position:
    """Where in a training a backup was made.

    Attributes:
        step: batches trained since the training began.
        epoch: the epoch of the next batch.
        batch: how many batches of that epoch are done.
        of: what the state belongs to: a text that must be the same at the restart.
        previous: step of the backup before it, None for the first.
    """

    step: int
    epoch: int
    batch: int
    of: str
    previous: int | None


class BackupFiles:
    """The backups of one rank."""

    def __init__(self, folder: str, rank: int) -> None:
        self._folder = f"{folder.rstrip('/')}/rank_{rank}"

    def found(self) -> list[Position]:
        """Those that are whole.

        Raises:
            ConfigError: a file is of another version of this library.
        """
        return [
            self._read(step)
            for step in self._steps()
            if tf.io.gfile.exists(self._done(step))
        ]

    def _steps(self) -> list[int]:
        if not tf.io.gfile.isdir(self._folder):
            return []
        found = map(_STEP.match, tf.io.gfile.listdir(self._folder))
        return sorted(int(match[1]) for match in found if match)

    def _read(self, step: int) -> Position:
        with tf.io.gfile.GFile(self._done(step), "r") as file:
            text = file.read()
        try:
            return Position(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise ConfigError(
                "a backup cannot be read; remove the folder to begin anew:"
                f" file={self._done(step)!r}: {error}"
            ) from error

    def state(self, step: int) -> str:
        """Prefix of the checkpoint's files."""
        return f"{self._folder}/step_{step}/state"

    def write(self, position: Position, checkpoint: Any) -> None:
        """Write ``checkpoint``, then say that it is whole."""
        tf.io.gfile.makedirs(f"{self._folder}/step_{position.step}")
        checkpoint.write(self.state(position.step))
        self.declare(position)

    def declare(self, position: Position) -> None:
        """Say that the state of this step is whole, and where in the training it is."""
        new = f"{self._done(position.step)}.new"
        with tf.io.gfile.GFile(new, "w") as file:
            file.write(json.dumps(dataclasses.asdict(position)))
        tf.io.gfile.rename(new, self._done(position.step), overwrite=True)

    def keep_only(self, step: int) -> None:
        """Remove the others, and what was not finished."""
        for other in self._steps():
            if other != step:
                tf.io.gfile.rmtree(f"{self._folder}/step_{other}")

    def remove(self) -> None:
        """All of them."""
        if tf.io.gfile.isdir(self._folder):
            tf.io.gfile.rmtree(self._folder)

    def _done(self, step: int) -> str:
        return f"{self._folder}/step_{step}/done.json"
