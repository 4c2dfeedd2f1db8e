"""A progress bar that survives a launcher's pipe."""

from __future__ import annotations

import sys
import time

_WIDTH = 24
_SECONDS_BETWEEN_UPDATES = 0.25


class Progress:
    """One line per epoch, redrawn in place; silent on every rank but the first.

    `tf_keras.utils.Progbar` redraws only on a terminal, and under `horovodrun` standard
    output is a pipe: it would print one line per step.

    Args:
        label: what the line is about, "epoch 3/12".
        total: steps until the bar is full.
        visible: false makes every call a no-op; pass `smp.rank() == 0`.
    """

    def __init__(self, label: str, total: int, visible: bool) -> None:
        self._label, self._total, self._visible = label, total, visible
        self._drawn_at = 0.0

    def update(self, step: int, text: str) -> None:
        """Show that `step` steps are done, then `text`; the last step always shows."""
        now = time.monotonic()
        last = step >= self._total
        if not self._visible or not (
            last or now - self._drawn_at > _SECONDS_BETWEEN_UPDATES
        ):
            return
        self._drawn_at = now
        full = _WIDTH * step // self._total
        bar = "=" * full + "." * (_WIDTH - full)
        end = "\n" if last else "\r"
        sys.stdout.write(f"{self._label} [{bar}] {step}/{self._total} {text}{end}")
        sys.stdout.flush()
