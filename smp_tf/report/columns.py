"""Columns of text, as all our tables have them."""

from collections.abc import Collection, Sequence

_MIB = 2**20


def aligned(rows: Sequence[Sequence[str]], left: Collection[int] = (0,)) -> list[str]:
    """One line a row, two blanks between columns.

    Args:
        left: columns of names, aligned to the left; figures go to the right.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def mib(size: int) -> str:
    """Bytes in MiB, with what digits say something."""
    return f"{size / _MIB:,.1f}" if size >= _MIB / 10 else f"{size / _MIB:.2g}"
