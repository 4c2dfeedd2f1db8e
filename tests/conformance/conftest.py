"""One table and one store of truths for all conformance tests."""

from collections.abc import Iterator
from typing import Any

import pytest

from tests.conformance.table import Table
from tests.conformance.truths import TruthStore, truth_store

_TABLE = pytest.StashKey[Table]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = Table()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    return request.config.stash[_TABLE]


@pytest.fixture(scope="session")
def store() -> Iterator[TruthStore]:
    with truth_store() as store:
        yield store


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    table = config.stash.get(_TABLE, None)
    if table is not None and table.rows:
        terminalreporter.section("conformance")
        terminalreporter.write_line(table.text())
