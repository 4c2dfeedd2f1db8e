"""The truths of a launch: computed once, in processes of plain TensorFlow.

    test process            2 processes, no session           1, 2, 3, .. ranks
    TruthStore.of()  ---->  write: a file for each key
    run_ranks()      ------------------------------------->   read

One process computes one truth; two of them share the keys, so that no core waits. The
number of ranks and the schedule are in no truth, so the files serve them all.
"""

import contextlib
import dataclasses
import os
import pathlib
import pickle
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from tests.ranks import run_ranks

_PROCESSES = 2


@dataclasses.dataclass(frozen=True)
class Truths:
    """Key -> what plain TensorFlow gives, in a folder."""

    folder: pathlib.Path

    def write(self, wanted: Mapping[tuple[Any, ...], Callable[[], Any]]) -> None:
        """Compute this process's share."""
        rank, size = (int(os.environ[f"HOROVOD_{name}"]) for name in ("RANK", "SIZE"))
        for key in list(wanted)[rank::size]:
            with self._path(key).open("xb") as file:  # no key is written twice
                pickle.dump(wanted[key](), file)

    def read(self, *key: Any) -> Any:
        return pickle.loads(self._path(key).read_bytes())

    def _path(self, key: tuple[Any, ...]) -> pathlib.Path:
        return self.folder / " ".join(map(str, key))


@contextlib.contextmanager
def truth_store() -> Iterator["TruthStore"]:
    """One whose files are gone in the end: pytest's folders would keep them."""
    with tempfile.TemporaryDirectory() as folder:
        yield TruthStore(pathlib.Path(folder))


class TruthStore:
    """The truths of a test run."""

    def __init__(self, folder: pathlib.Path) -> None:
        self._folder = folder
        self._known: dict[tuple[Callable[..., None], str], Truths] = {}

    def of(
        self, compute: Callable[[str, Truths], None], name: str, timeout: float
    ) -> Truths:
        """What ``compute(name, truths)`` has written, called by the first who asks.

        Raises:
            AssertionError: it failed, or took longer than ``timeout`` seconds.
        """
        if (compute, name) not in self._known:
            # Not one that an earlier call has left, which failed.
            truths = Truths(pathlib.Path(tempfile.mkdtemp(dir=self._folder)))
            run_ranks(_PROCESSES, compute, name, truths, timeout=timeout)
            self._known[compute, name] = truths
        return self._known[compute, name]
