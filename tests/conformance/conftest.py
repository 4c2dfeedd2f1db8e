"""One table for all conformance tests, printed when the run ends."""

from typing import Any

import pytest

from tests.conformance.table import Table

_TABLE = pytest.StashKey[Table]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_TABLE] = Table()


@pytest.fixture
def table(request: pytest.FixtureRequest) -> Table:
    return request.config.stash[_TABLE]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    table = config.stash.get(_TABLE, None)
    if table is not None and table.rows:
        terminalreporter.section("conformance")
        terminalreporter.write_line(table.text())
