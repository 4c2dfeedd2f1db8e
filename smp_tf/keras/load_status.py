"""What ``load_weights`` says of a file in TensorFlow's format, on every rank."""

from collections.abc import Mapping
from typing import Any

_CHECKS = (
    "assert_consumed",
    "assert_existing_objects_matched",
    "assert_nontrivial_match",
)


def checks_of(status: Any) -> dict[str, str | None]:
    """Method of a status -> the text of its AssertionError, None if it agrees."""
    texts: dict[str, str | None] = {}
    for name in _CHECKS:
        try:
            getattr(status, name)()
            texts[name] = None
        except AssertionError as error:
            texts[name] = str(error)
    return texts


class LoadStatus:
    """Like the status that ``tf.train.Checkpoint.restore`` returns.

    One rank has read the file; what it found was compared with the whole model once, at
    the end of loading, and is the same on every rank.

    Args:
        checks: of ``checks_of``.
        status: the original, on the rank that has it.
    """

    def __init__(self, checks: Mapping[str, str | None], status: Any = None) -> None:
        self._checks, self._status = checks, status

    def _check(self, name: str) -> "LoadStatus":
        text = self._checks[name]
        if text is not None:
            raise AssertionError(text)
        return self

    def assert_consumed(self) -> "LoadStatus":
        """Raise AssertionError unless file and model match one to one."""
        return self._check("assert_consumed")

    def assert_existing_objects_matched(self) -> "LoadStatus":
        """Raise AssertionError unless all of the model was in the file."""
        return self._check("assert_existing_objects_matched")

    def assert_nontrivial_match(self) -> "LoadStatus":
        """Raise AssertionError unless more than the model itself was in the file."""
        return self._check("assert_nontrivial_match")

    def expect_partial(self) -> "LoadStatus":
        """Do not warn of what was in the file and not in the model."""
        if self._status is not None:
            self._status.expect_partial()
        return self
