"""The memory of each rank at its fullest moment, as bars."""

from collections.abc import Sequence

from smp_tf.plan.memory import RankMemory
from smp_tf.report.markup import sized, tag

PARTS = (
    *("weights", "gradients", "optimizer"),
    *("activations", "allocator", "update"),
)


def memory_bars(memory: Sequence[RankMemory], limit: int | None = None) -> str:
    """A bar a rank, its parts to one scale, and a line at the limit."""
    scale = max([each.total for each in memory] + [limit or 0]) or 1
    legend = "".join(tag("span", tag("i", class_=part), part) for part in PARTS)
    if limit is not None:
        legend += tag("span", tag("i", class_="limit"), f"limit {sized(limit)}")
    rows = [_row(rank, each, scale, limit) for rank, each in enumerate(memory)]
    return tag("div", legend, class_="legend") + tag("div", *rows, class_="memory")


def _row(rank: int, memory: RankMemory, scale: int, limit: int | None) -> str:
    sizes = {part: getattr(memory, part) for part in PARTS}
    if not memory.update:  # the activations leave room enough for it
        del sizes["update"]
    parts = [
        tag(
            "i",
            class_=part,
            data_bytes=size,
            style=f"width:{100 * size / scale:.4f}%",
            title=f"{part}: {sized(size)} ({size:,} bytes)",
        )
        for part, size in sizes.items()
    ]
    is_over = limit is not None and memory.total > limit
    if limit is not None:
        place = f"left:{100 * limit / scale:.4f}%"
        parts.append(tag("u", style=place, title=f"limit: {limit:,} bytes"))
    figures = " · ".join(f"{part} {sized(size)}" for part, size in sizes.items())
    return tag(
        "div",
        tag("b", f"rank {rank}", class_=f"rank p{rank}"),
        tag("div", *parts, class_="stack", data_rank=rank),
        tag("strong", sized(memory.total)),
        tag("small", figures),
        *([tag("small", "over the limit", class_="over")] if is_over else []),
        class_="row",
    )
