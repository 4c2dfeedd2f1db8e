"""Scripts on n ranks with GPUs equal one process with one, bit for bit.

The GPUs are fakes, see tests/fake_device: all of smp_tf runs as it does on real ones,
TensorFlow's computations do not. What cuDNN and CUDA compute is not seen here.
"""

from collections.abc import Callable

import pytest

from tests.conformance import test_jobs, test_scripts
from tests.conformance.grid import GRIDS, LIMIT_SECONDS
from tests.conformance.table import Row, Table
from tests.conformance.truths import Truths, TruthStore
from tests.fake_device import library

pytestmark = pytest.mark.skipif(library.why_not() != "", reason=library.why_not())

_Check = Callable[[str, int, list[tuple[int, str]], Truths], list[Row]]


@pytest.fixture(autouse=True)
def on_fake_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TESTS_ON_GPU", "fake")


# Of their own: the truths of the other tests come from a CPU.


def write_scripts(themes: str, truths: Truths) -> None:
    test_scripts.write_themes(themes, truths)


def write_jobs(themes: str, truths: Truths) -> None:
    test_jobs.write_themes(themes, truths)


def check_on_gpus(
    themes: str,
    size: int,
    grid: list[tuple[int, str]],
    truths: Truths,
    check: _Check,
) -> list[Row]:
    rows = check(themes, size, grid, truths)
    found = library.counts()
    assert found.operations > 0, "nothing went by NCCL"
    assert (found.mistakes, found.mismatches) == (0, 0)
    return rows


@pytest.mark.timeout(2 * LIMIT_SECONDS + 20)
@pytest.mark.parametrize(
    ("check", "write", "themes", "size"),
    [
        (test_scripts.check_themes, write_scripts, "differentiation+dtypes", 2),
        (test_scripts.check_themes, write_scripts, "flow+reuse+state", 3),
        # Sizes that are sent ahead.
        (test_jobs.check_themes, write_jobs, "calls+signatures", 2),
    ],
)
def test_equals_one_process(
    check: _Check,
    write: Callable[[str, Truths], None],
    themes: str,
    size: int,
    table: Table,
    store: TruthStore,
) -> None:
    truths = store.of(write, themes, LIMIT_SECONDS)
    given = themes, GRIDS[size], truths, check
    table.run(size, check_on_gpus, *given, timeout=LIMIT_SECONDS)
