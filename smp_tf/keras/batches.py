"""A batch as microbatches, also when it does not divide into them.

    microbatches = 4, batch of 32   | 8 | 8 | 8 | 8 |         one pipeline of 4
    last batch of 10                | 3 | 3 | 3 |, then | 1 |  two, of 3 and 1

The microbatches of the first pipeline are as large as there need be for at most as many
as configured; what remains is a smaller one, in a pipeline of its own. Nothing is
padded or repeated, so that every layer, loss and metric sees each example once. The
parts count by their examples: gradients are those of the mean over the whole batch.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import tensorflow as tf


@dataclasses.dataclass(frozen=True)
class Piece:
    """A part of a batch that divides into microbatches of equal size.

    Attributes:
        start: its first example.
        rows: how many examples it has.
        microbatches: what it is divided into.
        share: of the whole batch's examples.
    """

    start: int
    rows: int
    microbatches: int
    share: float

    def of(self, data: Any) -> Any:
        """Its examples; ``data`` is any structure of tensors, None stays None."""

        def part(tensor: Any) -> Any:
            end = self.start + self.rows
            return None if tensor is None else tensor[self.start : end]

        return tf.nest.map_structure(part, data)


def pieces_of(rows: int, microbatches: int) -> tuple[Piece, ...]:
    """One or two pieces for a batch of ``rows`` examples, at least 1."""
    size = -(-rows // microbatches)
    count = rows // size
    whole = count * size
    found = [Piece(0, whole, count, whole / rows)]
    if whole < rows:
        found.append(Piece(whole, rows - whole, 1, (rows - whole) / rows))
    return tuple(found)


def num_rows(data: Any) -> int | None:
    """Examples of a batch; None if its tensors do not say, or have none."""
    for tensor in tf.nest.flatten(data):
        shape = getattr(tensor, "shape", None)
        if shape is not None and shape.rank:
            rows: int | None = shape[0]
            return rows
    return None


def weighted_sum(values: Sequence[Any], shares: Sequence[float]) -> Any:
    """What the pieces' means are together; None where all are None.

    One piece is given back as it is. IndexedSlices stay sparse.
    """
    if len(values) == 1 or all(value is None for value in values):
        return values[0]
    if any(isinstance(value, tf.IndexedSlices) for value in values):
        return tf.IndexedSlices(
            tf.concat(
                [
                    value.values * tf.cast(share, value.values.dtype)
                    for value, share in zip(values, shares, strict=True)
                ],
                0,
            ),
            tf.concat([value.indices for value in values], 0),
            values[0].dense_shape,
        )
    return tf.add_n(
        [
            value * tf.cast(share, value.dtype)
            for value, share in zip(values, shares, strict=True)
        ]
    )
