"""The table of the conformance tests: a row for each configuration that was compared.

Ranks return rows, a test merges those of its ranks and asserts that all are equal to
the truth, and ``conftest`` prints every row at the end of the run.
"""

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tests.ranks import run_ranks

_SHOWN_STAGES = 8  # as many as 4 partitions without detours have
_SHOWN_RESULT = 72  # characters; the assertion has the rest


@dataclasses.dataclass(frozen=True)
class Row:
    """One configuration, and what differs from the truth: nothing, or a text."""

    model: str
    partitions: int
    microbatches: int
    schedule: str
    style: str
    stages: str = ""
    wrong: str = ""

    @property
    def result(self) -> str:
        first = self.wrong.strip().split("\n")[0]
        return f"DIFFERS: {first[:_SHOWN_RESULT]}" if first else "equal"

    def shown(self) -> "Row":
        """Itself, printed: in the output of a rank that does not come to its end."""
        print(self, flush=True)
        return self


COLUMNS = (
    "model",
    "partitions",
    "microbatches",
    "schedule",
    "style",
    "stages",
    "result",
)


def stages_of(plan: Any) -> str:
    """The stages of a step, in pipeline order."""
    return " ".join(f"{s.kind.value}{s.partition}" for s in plan.segments.segments)


def short(stages: str) -> str:
    """Both ends of a long list of stages, and how many there are."""
    names = stages.split()
    if len(names) <= _SHOWN_STAGES:
        return stages
    return " ".join([*names[:4], "..", *names[-2:], f"({len(names)})"])


def idle_partitions(plan: Any, size: int) -> str:
    """What is wrong with a plan that leaves partitions without work, if any."""
    idle = set(range(size)) - {s.partition for s in plan.segments.segments}
    return f"nothing to do for partitions {sorted(idle)}" if idle else ""


def merged(rows: Sequence[Row]) -> Row:
    """The row of a configuration, from those that each rank has for it."""
    wrong = [f"rank {rank}: {r.wrong}" for rank, r in enumerate(rows) if r.wrong]
    first = dataclasses.replace(rows[0], wrong="")
    if any(dataclasses.replace(row, wrong="") != first for row in rows):
        wrong.append(f"the ranks have different rows: {rows}")
    return dataclasses.replace(first, wrong="\n".join(wrong))


class Table:
    """The rows of one test run."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    def run(
        self,
        size: int,
        check: Callable[..., list[Row]],
        name: str,
        *args: Any,
        timeout: float,
    ) -> None:
        """Call ``check(name, size, *args)`` on ``size`` ranks; keep its rows.

        Raises:
            AssertionError: a rank failed, or a row differs from the truth.
        """
        try:
            by_rank = run_ranks(size, check, name, size, *args, timeout=timeout)
        except AssertionError:
            self.rows.append(Row(name, size, 0, "", "", wrong="the launch failed"))
            raise
        rows = [merged(each) for each in zip(*by_rank, strict=True)]
        assert rows, f"{name}: nothing was compared"
        self.rows += rows
        wrong = [row for row in rows if row.wrong]
        assert not wrong, "\n".join(
            f"{row.model} microbatches={row.microbatches} {row.schedule} {row.style}:"
            f" {row.stages}\n{row.wrong}"
            for row in wrong
        )

    def text(self) -> str:
        cells = [_cells(row) for row in self.rows]
        widths = [max(map(len, column)) for column in zip(COLUMNS, *cells)]
        different = sum(bool(row.wrong) for row in self.rows)
        return "\n".join(
            [
                *(_line(each, widths) for each in (COLUMNS, *cells)),
                f"{len(self.rows) - different} equal to one process, bit for bit;"
                f" {different} not",
            ]
        )


def _cells(row: Row) -> tuple[str, ...]:
    shown = dataclasses.replace(row, stages=short(row.stages))
    return tuple(str(getattr(shown, column) or "-") for column in COLUMNS)


def _line(cells: Iterable[str], widths: Iterable[int]) -> str:
    """Numbers to the right, like their headers; text to the left."""
    return "  ".join(
        cell.rjust(width) if name in COLUMNS[1:3] else cell.ljust(width)
        for name, cell, width in zip(COLUMNS, cells, widths)
    ).rstrip()
