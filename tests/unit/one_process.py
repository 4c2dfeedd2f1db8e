"""A session without a launcher, for tests that need no second rank."""

import contextlib
from collections.abc import Iterator
from typing import Any

import smp_tf as smp


@contextlib.contextmanager
def session(**config: Any) -> Iterator[None]:
    """Between ``smp.init`` and ``smp.shutdown``; one that was left open is closed."""
    smp.shutdown()
    smp.init({"partitions": 1, **config})
    try:
        yield
    finally:
        smp.shutdown()
