"""Small text files that hold a part of a plan: read whole, or written whole."""

import contextlib
import os
from pathlib import Path

from smp_tf.errors import ConfigError


def read_text(key: str, name: str, remedy: str) -> str:
    """What the file holds that the configuration key names.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        return Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"`{key}`: cannot be read: {error}; {key}={name!r}; {remedy}"
        ) from None


def replace_text(path: str | os.PathLike[str], text: str) -> None:
    """Write it all, or leave what was there."""
    target = Path(path).expanduser()
    unfinished = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        unfinished.write_text(text, encoding="utf-8")
        os.replace(unfinished, target)
    finally:
        with contextlib.suppress(FileNotFoundError):
            unfinished.unlink()
