"""The trace file of one rank: Chrome's JSON array format, one event a line.

    [
    {"name":"smp_tf","ph":"M",..}          who wrote it
    {"name":"smp_step","ph":"M",..}        a step and its predicted schedule
    {"name":"0F0","cat":"call",..}         a run: calls, waits, sends ..
    {"name":"train_step","cat":"run",..}   .. and the run itself: it is complete
    ]

The format lets the closing bracket be missing, so the file of a rank that was killed
opens in Perfetto as it is. ``ts`` is microseconds on the clock of rank 0.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from smp_tf.errors import SmpError
from smp_tf.plan.action import Action
from smp_tf.report.timeline.plan import PlannedStep
from smp_tf.report.timeline.run import Label, RankRun, Recorded, Span, times_of

FORMAT = 1
"""Raised when a reader of before would misread what is written now."""

_NAME = "rank_{}.trace.json"


@dataclasses.dataclass(frozen=True)
class Writer:
    """Who writes a file.

    Attributes:
        group: pp_rank -> world rank, of this rank's replica.
        session: random, the same on all ranks; tells the files of one job from those
            that an earlier one left in the folder.
        started: seconds since 1970, when the session began on rank 0.
        offset_ns: what the clock of rank 0 shows more than this rank's.
        error_ns: by how much the offset may be wrong; 0 for one and the same clock.
    """

    rank: int
    pp_rank: int
    group: tuple[int, ...]
    session: str
    started: float = 0.0
    offset_ns: int = 0
    error_ns: int = 0


@dataclasses.dataclass(frozen=True)
class RunHead:
    """A complete run, its parts still text."""

    step: int
    run: int
    start_ns: int
    end_ns: int
    lines: tuple[int, int]  # first, and one behind the last

    @property
    def seconds(self) -> float:
        return (self.end_ns - self.start_ns) / 1e9


@dataclasses.dataclass(frozen=True)
class RankTrace:
    """A file that was read; ``load`` reads a run's parts."""

    path: Path
    writer: Writer
    steps: Mapping[int, PlannedStep]
    heads: tuple[RunHead, ...]
    text: Sequence[str]

    def load(self, head: RunHead) -> RankRun:
        """Raises SmpError, naming the line, if the file was damaged."""
        calls: list[Span] = []
        waits: list[Span] = []
        sends: list[Span] = []
        lists = {"call": calls, "wait": waits, "send": sends}
        for index in range(*head.lines):
            event = _parsed(self.path, index, self.text[index])
            try:
                if event["ph"] == "e":  # of the send in the line before
                    sends[-1] = sends[-1]._replace(end_ns=_ns(event["ts"]))
                    continue
                args, start = event.get("args", {}), _ns(event["ts"])
                span = Span(
                    Action.from_text(event["name"]),
                    start,
                    start + _ns(event.get("dur", 0)),
                    args.get("tensor", ""),
                    args.get("bytes", 0),
                )
                if (span.action.peer or 0) >= len(self.writer.group):
                    raise ValueError("no such peer")
                lists[event["cat"]].append(span)
            except (LookupError, TypeError, ValueError, SmpError) as error:
                raise _broken(self.path, index) from error
        return RankRun(
            head.step,
            head.run,
            head.start_ns,
            head.end_ns,
            tuple(calls),
            tuple(waits),
            tuple(sends),
        )


def file_name(rank: int | str) -> str:
    """``rank`` may be a pattern."""
    return _NAME.format(rank)


# --- writing


def head_text(writer: Writer) -> str:
    """How a file begins."""
    about = {"format": FORMAT, **dataclasses.asdict(writer)}
    name = f"rank {writer.rank} (partition {writer.pp_rank})"
    lines = [
        _meta("smp_tf", writer.rank, about),
        _meta("process_name", writer.rank, {"name": name}),
        _meta("process_sort_index", writer.rank, {"sort_index": writer.rank}),
        _meta("thread_name", writer.rank, {"name": "step"}),
    ]
    return "[\n" + "".join(lines)


def step_text(rank: int, step: PlannedStep) -> str:
    """Before the first run of a step."""
    return _meta("smp_step", rank, step.to_json())


class RunText:
    """Writes runs of one step. What is the same in every run is made once: this works
    beside the training."""

    def __init__(
        self, step: PlannedStep, labels: Sequence[Label | None], writer: Writer
    ) -> None:
        self._writer = writer
        rank = writer.rank
        self._labels = [label and _constant_text(label, rank) for label in labels]
        self._run = _event_text(step.name, "run", rank) + '"ph":"X",'
        self._step = step.number

    def of(self, events: Iterable[Recorded]) -> str:
        """The lines of a complete run."""
        times, shift = times_of(events), self._writer.offset_ns
        lines = []
        for start, index, end, size in times.spans:
            label = self._labels[index]
            if label is None:
                continue
            category, head, args = label
            since = _us(start + shift)
            if category == "call":
                lines.append(f'{head}"ts":{since},"dur":{_us(end - start)}}},\n')
            elif category == "wait":
                lines.append(
                    f'{head}"ts":{since},"dur":{_us(end - start)},{args}{size}}}}},\n'
                )
            else:
                head = f'{head}"id":"{self._writer.rank}.{times.run}.{index}",'
                lines.append(f'{head}"ph":"b","ts":{since},{args}{size}}}}},\n')
                lines.append(f'{head}"ph":"e","ts":{_us(end + shift)}}},\n')
        lines.append(
            f'{self._run}"ts":{_us(times.start_ns + shift)},'
            f'"dur":{_us(times.end_ns - times.start_ns)},"args":{{"step":{self._step},'
            f'"run":{times.run},"lines":{len(lines)}}}}},\n'
        )
        return "".join(lines)


def _constant_text(label: Label, rank: int) -> tuple[str, str, str]:
    """Category, how the line begins, and its arguments up to the number of bytes."""
    kind = label.action.kind
    category = "call" if kind.is_compute else "send" if kind.is_send else "wait"
    head = _event_text(str(label.action), category, rank)
    if category != "send":  # sends overlap, and have two lines for that
        head += '"ph":"X",'
    return category, head, f'"args":{{"tensor":{json.dumps(label.tensor)},"bytes":'


def _event_text(name: str, category: str, rank: int) -> str:
    return f'{{"name":{json.dumps(name)},"cat":"{category}","pid":{rank},"tid":0,'


def tail_text(rank: int, dropped: int) -> str:
    """How a file ends, if its rank was not killed; makes it strict JSON."""
    return _meta("smp_end", rank, {"dropped_events": dropped}).rstrip(",\n") + "\n]\n"


def _meta(name: str, rank: int, args: Mapping[str, Any]) -> str:
    event = {"name": name, "ph": "M", "pid": rank, "tid": 0, "args": args}
    return json.dumps(event, separators=(",", ":")) + ",\n"


def _us(ns: int) -> str:
    return f"{ns // 1000}.{ns % 1000:03d}"


# --- reading


def read_trace(path: Path) -> RankTrace:
    """Read a file, also one whose writer was killed in the middle of a line.

    Raises:
        SmpError: it cannot be read, is not ours, or has a line that is no event.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise SmpError(f"cannot read a trace: file={path}: {error}") from None
    lines.pop()  # after the last line break: nothing, or half a line
    if not lines or lines[0] != "[" or len(lines) < 2:
        raise SmpError(f"not a trace of smp_tf, or an empty one: file={path}")
    writer = _writer(path, _parsed(path, 1, lines[1]))
    steps: dict[int, PlannedStep] = {}
    heads = []
    for index, line in enumerate(lines):
        if index == 0 or (line == "]" and index == len(lines) - 1):
            continue
        if not (line.startswith('{"') and line.rstrip(",").endswith("}")):
            raise _broken(path, index)
        try:
            if '"cat":"run"' in line:
                heads.append(_head(index, _parsed(path, index, line)))
            elif line.startswith('{"name":"smp_step"'):
                step = PlannedStep.from_json(_parsed(path, index, line)["args"])
                steps[step.number] = step
        except (KeyError, TypeError, ValueError) as error:
            raise _broken(path, index) from error
    unknown = {head.step for head in heads} - set(steps)
    if unknown:
        raise SmpError(f"runs of steps that are not described: file={path} {unknown}")
    return RankTrace(path, writer, steps, tuple(heads), lines)


def _writer(path: Path, event: Mapping[str, Any]) -> Writer:
    about = event.get("args")
    if event.get("name") != "smp_tf" or not isinstance(about, dict):
        raise SmpError(f"not a trace of smp_tf: file={path}")
    if about.get("format") != FORMAT:
        raise SmpError(
            f"a trace of another version of smp_tf: file={path}"
            f" format={about.get('format')!r}; this version reads {FORMAT}"
        )
    try:
        values = {field.name: about[field.name] for field in dataclasses.fields(Writer)}
        return Writer(**{**values, "group": tuple(values["group"])})
    except (KeyError, TypeError) as error:
        raise _broken(path, 1) from error


def _head(index: int, event: Mapping[str, Any]) -> RunHead:
    args, start = event["args"], _ns(event["ts"])
    first = index - args["lines"]
    if first < 1:
        raise ValueError("more lines than the file has")
    end = start + _ns(event["dur"])
    return RunHead(args["step"], args["run"], start, end, (first, index))


def _parsed(path: Path, index: int, line: str) -> dict[str, Any]:
    try:
        event = json.loads(line.rstrip(","))
    except ValueError as error:
        raise _broken(path, index) from error
    if not isinstance(event, dict):
        raise _broken(path, index)
    return event


def _ns(microseconds: float) -> int:
    return round(microseconds * 1000)


def _broken(path: Path, index: int) -> SmpError:
    return SmpError(f"a trace is damaged: file={path} line={index + 1}")
