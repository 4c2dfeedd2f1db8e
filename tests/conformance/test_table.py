"""The table itself: differences are seen, in it and by pytest."""

import dataclasses

import pytest

from tests.conformance.table import Row, Table, merged, short

EQUAL = Row("stack", 2, 4, "simple", "tape", "F0 F1 B1 B0")
WRONG = dataclasses.replace(EQUAL, wrong="loss[0] (off by 1)\nand a trace")


def rows_of(name: str, size: int, row: Row) -> list[Row]:
    return [row]


def fails(name: str, size: int) -> list[Row]:
    raise ValueError("on purpose")


def test_text() -> None:
    table = Table()
    table.rows = [EQUAL, dataclasses.replace(WRONG, model="long_name", partitions=12)]
    assert table.text().splitlines() == [
        "model      partitions  microbatches  schedule  style  stages       result",
        "stack               2             4  simple    tape   F0 F1 B1 B0  equal",
        "long_name          12             4  simple    tape   F0 F1 B1 B0  "
        "DIFFERS: loss[0] (off by 1)",
        "1 equal to one process, bit for bit; 1 not",
    ]


def test_long_lists_of_stages_are_cut() -> None:
    assert short("F0 F1 F2 F3 B3 B2 B1 B0") == "F0 F1 F2 F3 B3 B2 B1 B0"
    assert short("F0 F1 F0 F1 F0 B0 B1 B1 B0") == "F0 F1 F0 F1 .. B1 B0 (9)"


def test_merging_names_the_ranks_that_differ() -> None:
    assert merged([EQUAL, EQUAL]) == EQUAL
    assert merged([EQUAL, WRONG]).wrong == f"rank 1: {WRONG.wrong}"
    other = dataclasses.replace(EQUAL, stages="F0 F1")
    assert "different rows" in merged([EQUAL, other]).wrong


def test_a_difference_and_a_failed_launch_fail_and_have_rows() -> None:
    table = Table()
    table.run(1, rows_of, "stack", EQUAL, timeout=30)
    with pytest.raises(AssertionError, match="off by 1"):
        table.run(1, rows_of, "stack", WRONG, timeout=30)
    with pytest.raises(AssertionError, match="on purpose"):
        table.run(1, fails, "stack", timeout=30)
    assert [row.result for row in table.rows] == [
        "equal",
        "DIFFERS: rank 0: loss[0] (off by 1)",
        "DIFFERS: the launch failed",
    ]
