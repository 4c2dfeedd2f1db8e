"""Channel numbers of a session: what is built in the same order on all ranks of a
pipeline gets the same numbers there.

    0 ..            the steps of a pipeline
    0x08000000 ..   the optimizers of a dp_group, see data_parallel
    0x0E000000 ..   sums over a group, one channel each
    0x0F000000 ..   objects, see transport.messages

Replicas of a model may trace other steps, so what they exchange is not counted with
those.
"""

from typing import Any

OF_REPLICAS = 0x08000000
OF_SUMS = 0x0E000000


class Channels:
    """The numbers that are taken in the current session, from ``start`` on."""

    def __init__(self, start: int = 0) -> None:
        self._start = start
        self._session: Any = None
        self._next = start

    def first_free(self, session: Any) -> int:
        """The number that ``take`` would give."""
        if self._session is not session:
            self._session, self._next = session, self._start
        return self._next

    def take(self, session: Any, count: int, at_least: int = 0) -> int:
        """Take ``count`` numbers, from the first free one that is not less than
        ``at_least``; the first of them."""
        first = max(self.first_free(session), at_least)
        self._next = first + count
        return first


channels = Channels()
"""Those of this process's steps."""

replica_channels = Channels(OF_REPLICAS)
"""Those that it has taken together with its dp_group."""
