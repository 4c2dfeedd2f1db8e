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

from smp_tf.errors import ConfigError


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
        shape = _shape(tensor)
        if shape is not None and shape.rank:
            rows: int | None = shape[0]
            return rows
    return None


def require_rows(call: str, data: Any) -> None:
    """Every tensor of a batch has one row for each example.

    Otherwise a constant beside the examples would be cut as if it were some.

    Raises:
        ConfigError: with the shapes.
    """
    tensors = [each for each in tf.nest.flatten(data) if each is not None]
    sparse = [type(each).__name__ for each in tensors if _is_composite(each)]
    if sparse:
        raise ConfigError(
            "a batch is cut into microbatches, which dense tensors can be only:"
            f" method={call} types={sparse}; convert them in the dataset (to_tensor,"
            " tf.sparse.to_dense) and make them sparse or ragged in the model"
        )
    shapes = [_shape(each) for each in tensors]
    known = [shape for shape in shapes if shape is not None and shape.rank is not None]
    rows = {shape[0] for shape in known if shape.rank and shape[0] is not None}
    if len(rows) > 1 or any(shape.rank == 0 for shape in known):
        texts = ", ".join(str(tuple(shape)) for shape in known)
        raise ConfigError(
            "a batch is cut into microbatches by its examples, so that every tensor"
            f" needs a row for each of them: method={call} shapes={texts}; repeat what"
            " all examples share for each, or make it part of the model"
        )


def _shape(tensor: Any) -> tf.TensorShape | None:
    shape = getattr(tensor, "shape", None)
    return None if shape is None else tf.TensorShape(shape)


def _is_composite(tensor: Any) -> bool:
    return isinstance(tensor, (tf.RaggedTensor, tf.SparseTensor))


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
