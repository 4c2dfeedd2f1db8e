"""Which gradients travel together.

A message for each gradient would cost more than its bytes, for there are many small
ones; one message for all would have to wait for the last of them. Backward makes them
in about the reverse order of the variables, so that neighbours are there at about the
same time:

    gradients   a  b  c | d  e | F | g  h           reversed, cut after WINDOW_BYTES
    buckets     (a c) (b) | (d e) | (F) | (g h)     in each window by owner and type
"""

import dataclasses
from collections.abc import Sequence

WINDOW_BYTES = 8 << 20


@dataclasses.dataclass(frozen=True)
class Part:
    """What is known of a gradient, or of a variable, on all ranks.

    Attributes:
        shape: None for unknown sizes, and in place of the whole for an unknown rank.
        dtype: name of the type.
        num_bytes: None if not known.
        owner: dp_rank that it goes to, or comes from; None if that is all of them.
        index_dtype: for IndexedSlices, type of their indices; else "".
    """

    shape: tuple[int | None, ...] | None
    dtype: str
    num_bytes: int | None
    owner: int | None = None
    index_dtype: str = ""

    def __str__(self) -> str:
        sizes = "of any shape" if self.shape is None else f"{list(self.shape)}"
        kind = f"rows, indices {self.index_dtype}" if self.index_dtype else "dense"
        return f"{self.dtype} {sizes} {kind}"

    @property
    def travels_alone(self) -> bool:
        return bool(self.index_dtype) or self.num_bytes is None


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Parts of one type that travel as one vector; a single part travels as it is.

    Attributes:
        places: of the parts, in ascending order.
    """

    places: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def first(self) -> Part:
        return self.parts[0]


def buckets_of(
    parts: Sequence[Part | None], window_bytes: int = WINDOW_BYTES
) -> tuple[Bucket, ...]:
    """Divide the parts, in the order in which backward makes them: the last first.

    Args:
        parts: None for what does not travel.
    """
    found: list[tuple[int, ...]] = []
    window: dict[tuple[str, int | None], list[int]] = {}
    in_window = 0
    for place in reversed(range(len(parts))):
        part = parts[place]
        if part is None:
            continue
        if part.travels_alone:
            found.append((place,))
            continue
        assert part.num_bytes is not None
        if in_window and in_window + part.num_bytes > window_bytes:
            found += [tuple(reversed(places)) for places in window.values()]
            window, in_window = {}, 0
        window.setdefault((part.dtype, part.owner), []).append(place)
        in_window += part.num_bytes
    found += [tuple(reversed(places)) for places in window.values()]
    return tuple(
        Bucket(places, tuple(part for i in places if (part := parts[i]) is not None))
        for places in found
    )
