"""``python -m smp_tf info``: what a machine has, for people and as JSON.

    smp_tf       0.1.0; path /venv/smp_tf
    UCX          1.22.0; path /venv/libucx/lib/libucp.so.0
    NCCL         not used: no GPU (libcuda.so.1: cannot open shared object file)
    ..
    ranks    messages                  watch    GPU to GPU
    0 and 1  posix/memory cma/memory   tcp/lo   NCCL

The facts are gathered by ``runtime.facts``.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from smp_tf.report.columns import aligned, mib

Value = str | int | bool


@dataclass(frozen=True)
class Part:
    """One thing that a job may use, as it was found.

    Attributes:
        facts: (name, value); a name that ends with _bytes is printed in MiB.
        why_not: why it is not used; "" if it can be.
    """

    name: str
    facts: tuple[tuple[str, Value], ...] = ()
    why_not: str = ""


@dataclass(frozen=True)
class Pair:
    """What two ranks talk by.

    Attributes:
        messages: UCX's transports for data.
        watch: UCX's transports by which one learns of the other's end.
        gpus: "NCCL", or why tensors do not go from GPU to GPU.
    """

    ranks: tuple[int, int]
    messages: str
    watch: str
    gpus: str


@dataclass(frozen=True)
class RankInfo:
    """What is known of a rank beside its parts.

    Attributes:
        gpu: the one that it uses; "" for none.
    """

    rank: int
    host: str
    gpu: str
    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Info:
    """All of it, as rank 0 knows it.

    Attributes:
        parts: of this rank.
        ranks, pairs: of the job; empty without one.
        why_no_job: why the ranks did not meet; "" if they did, or there is one only.
    """

    parts: tuple[Part, ...]
    ranks: tuple[RankInfo, ...] = ()
    pairs: tuple[Pair, ...] = ()
    why_no_job: str = ""

    def differences(self) -> list[tuple[int, Part]]:
        """(rank, part) where another rank has found something else than rank 0."""
        return [
            (other.rank, part)
            for other in self.ranks[1:]
            for part in other.parts
            if part not in self.ranks[0].parts
        ]


def info_text(info: Info) -> str:
    """The parts, one a line, then the ranks and the pairs of ranks."""
    lines = aligned([(part.name, _line(part)) for part in info.parts], left=(0, 1))
    if info.why_no_job:
        lines += ["", f"the ranks did not meet: {info.why_no_job}"]
    differences = info.differences()
    if differences:
        rows = [(f"rank {rank}", part.name, _line(part)) for rank, part in differences]
        lines += ["", "not as on rank 0", *aligned(rows, left=(0, 1, 2))]
    if info.ranks:
        rows = [("rank", "host", "GPU")]
        rows += [(str(each.rank), each.host, each.gpu or "-") for each in info.ranks]
        lines += ["", *aligned(rows, left=(0, 1, 2))]
    if info.pairs:
        lines += ["", *_pair_lines(info.pairs)]
    return "\n".join(lines)


def info_json(info: Info) -> str:
    """The same as JSON: {parts, ranks, pairs, why_no_job, differences}."""
    ranks = [{"rank": e.rank, "host": e.host, "gpu": e.gpu} for e in info.ranks]
    differences = [
        {"rank": rank, "part": part.name, **_plain(part)}
        for rank, part in info.differences()
    ]
    return json.dumps(
        {
            "parts": {part.name: _plain(part) for part in info.parts},
            "ranks": ranks,
            "pairs": [asdict(pair) for pair in info.pairs],
            "why_no_job": info.why_no_job,
            "differences": differences,
        },
        indent=2,
    )


def _pair_lines(pairs: Sequence[Pair]) -> list[str]:
    rows = [("ranks", "messages", "watch", "GPU to GPU")]
    for pair in pairs:
        low, high = pair.ranks
        rows.append((f"{low} and {high}", pair.messages, pair.watch, pair.gpus))
    return aligned(rows, left=(0, 1, 2, 3))


def _line(part: Part) -> str:
    texts = [_fact(name, value) for name, value in part.facts]
    if part.why_not:
        texts.append(f"not used: {part.why_not}")
    return "; ".join(texts)


def _fact(name: str, value: Value) -> str:
    if name.endswith("_bytes") and isinstance(value, int):
        return f"{name.removesuffix('_bytes')} {mib(value)} MiB"
    shown = {True: "yes", False: "no"}[value] if isinstance(value, bool) else value
    return str(shown) if name in ("version", "name") else f"{name} {shown}"


def _plain(part: Part) -> dict[str, Any]:
    return {**dict(part.facts), "why_not": part.why_not}
