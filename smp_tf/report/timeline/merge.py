"""All ranks of a folder in one Chrome trace: messages as arrows, bytes as a curve."""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from typing import Any

from smp_tf.report.timeline.file import RankTrace
from smp_tf.report.timeline.folder import Folder
from smp_tf.report.timeline.run import RankRun, Span
from smp_tf.report.timeline.stats import in_flight

_Key = tuple[int, int, int, int, str]  # run, source, peer, microbatch, tensor


def merged_text(folder: Folder) -> Iterator[str]:
    """The file, piece by piece; strict JSON.

    A process is a rank. An arrow leads from the call that made a tensor to the next
    call on the rank that got it.
    """
    yield "[\n"
    for trace in folder.traces:
        lines = [line.rstrip(",") for line in trace.text if line not in ("[", "]")]
        yield "".join(f"{line},\n" for line in lines)
    numbers: dict[_Key, int] = {}
    for trace in folder.traces:
        for head in trace.heads:
            events = _added(trace, trace.load(head), numbers)
            yield "".join(f"{json.dumps(event)},\n" for event in events)
    origin = {"tool": "smp_tf", "ranks": len(folder.traces)}
    end = {"name": "smp_merged", "ph": "M", "pid": 0, "tid": 0, "args": origin}
    yield f"{json.dumps(end)}\n]\n"


def _added(
    trace: RankTrace, run: RankRun, numbers: dict[_Key, int]
) -> Iterator[dict[str, Any]]:
    rank, group = trace.writer.rank, trace.writer.group
    starts = [call.start_ns for call in run.calls]
    made = {(span.action.stage, span.action.mb): span for span in run.calls}
    for span in run.sends:
        source = made.get((span.action.stage, span.action.mb))
        if source is not None:
            # In its last nanosecond, so that the arrow starts at this slice.
            time = max(source.end_ns - 1, source.start_ns)
            ends = rank, _peer(span, group)
            yield _arrow(span, "s", rank, time, run, ends, numbers)
    for span in run.waits:
        reader = bisect.bisect_left(starts, span.end_ns)
        if reader < len(starts):
            time = starts[reader]
        else:  # a returned value, which no call reads: the wait itself
            time = max(span.end_ns - 1, span.start_ns)
        ends = _peer(span, group), rank
        yield _arrow(span, "f", rank, time, run, ends, numbers)
    for time, size in in_flight(run.sends):
        yield {
            "name": "bytes in flight",
            "ph": "C",
            "pid": rank,
            "tid": 0,
            "ts": time / 1000,
            "args": {"bytes": size},
        }


def _arrow(
    span: Span,
    phase: str,
    rank: int,
    time: int,
    run: RankRun,
    ends: tuple[int, int],
    numbers: dict[_Key, int],
) -> dict[str, Any]:
    """One end of an arrow; both ends find the same number."""
    key = (run.run, *ends, span.action.mb, span.tensor)
    event = {
        "name": span.tensor,
        "cat": "message",
        "ph": phase,
        "id": numbers.setdefault(key, len(numbers) + 1),
        "pid": rank,
        "tid": 0,
        "ts": time / 1000,
    }
    return {**event, "bp": "e"} if phase == "f" else event


def _peer(span: Span, group: tuple[int, ...]) -> int:
    assert span.action.peer is not None  # a message's always has one
    return group[span.action.peer]
