"""A trace file that grows while its rank trains, and never stops the training."""

import logging
from pathlib import Path

from smp_tf.report.timeline.file import (
    Writer,
    file_name,
    head_text,
    step_text,
    tail_text,
)
from smp_tf.report.timeline.plan import PlannedStep

MAX_BYTES = 64 * 2**20
"""Of one file: some 500,000 actions, which opens fast. Later runs are left out."""

logger = logging.getLogger("smp_tf")


class TraceFile:
    """The file of one rank. No method raises: the first problem is told, once, and
    ends the recording."""

    def __init__(
        self, folder: Path, writer: Writer, max_bytes: int = MAX_BYTES
    ) -> None:
        self._path = folder / file_name(writer.rank)
        self._writer = writer
        self._most = self._left = max_bytes
        self._steps: set[int] = set()
        self._file = None
        try:
            folder.mkdir(parents=True, exist_ok=True)
            # Without a buffer: what a killed rank has written is there.
            self._file = self._path.open("wb", buffering=0)
        except OSError as error:
            self._stop(f"cannot be written: {error}")
        self._write(head_text(writer))

    def write(self, step: PlannedStep, text: str) -> None:
        """Add a complete run of a step, as ``RunText`` writes it."""
        if self._file is None:
            return
        if step.number not in self._steps:
            text = step_text(self._writer.rank, step) + text
        if len(text) > self._left:
            self._write(tail_text(self._writer.rank, 0))
            self._stop(f"is full: it has {self._most / 2**20:.3g} MiB")
        elif self._write(text):
            self._steps.add(step.number)
            self._left -= len(text)

    def close(self, dropped: int) -> None:
        """Write the end; ``dropped`` events came too fast to be written."""
        if dropped:
            logger.warning(
                "rank %d: %d events were too many to write: trace=%s",
                self._writer.rank,
                dropped,
                self._path,
            )
        if self._write(tail_text(self._writer.rank, dropped)):
            self._stop()

    def _write(self, text: str) -> bool:
        if self._file is None:
            return False
        data = memoryview(text.encode())
        try:
            while data:
                data = data[self._file.write(data) or 0 :]
        except OSError as error:  # a full disk
            self._stop(f"cannot be written: {error}")
            return False
        return True

    def _stop(self, reason: str = "") -> None:
        file, self._file = self._file, None
        if file is not None:
            try:
                file.close()
            except OSError as error:
                reason = reason or f"cannot be written: {error}"
        if reason:
            logger.warning(
                "rank %d: the trace %s; trace=%s. Training goes on without it.",
                self._writer.rank,
                reason,
                self._path,
            )
