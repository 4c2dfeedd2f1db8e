"""Trace files: what is written is read, and what is damaged is named."""

import json

import pytest

from smp_tf.errors import SmpError
from smp_tf.report.timeline.file import (
    Writer,
    file_name,
    head_text,
    read_trace,
    step_text,
    tail_text,
)
from smp_tf.report.timeline.folder import read_folder
from smp_tf.report.timeline.merge import merged_text
from tests.unit.report.timeline.example_timelines import (
    SIZE,
    example_folder,
    example_run,
    run_text,
)


def files(folder):
    return sorted(folder.glob("*.trace.json"))


def fails(function, *arguments):
    with pytest.raises(SmpError) as caught:
        function(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_written_is_read(tmp_path):
    runs = example_folder(tmp_path, ranks=3, microbatches=4)
    folder = read_folder(tmp_path)
    assert [trace.writer.rank for trace in folder.traces] == [0, 1, 2]
    for place, run in enumerate(runs):
        found = folder.choose("train_step", place)
        assert found.ranks == run.ranks
        assert found.planned == run.planned and found.group == (0, 1, 2)
        assert (found.place, found.count, found.is_typical) == (place, 3, False)
        assert found.stats == run.stats


def test_a_closed_file_is_strict_json_and_an_open_one_needs_its_bracket(tmp_path):
    example_folder(tmp_path)
    events = json.loads(files(tmp_path)[0].read_text())
    assert {event["ph"] for event in events} == {"M", "X", "b", "e"}
    example_folder(tmp_path, closed=False)
    text = files(tmp_path)[0].read_text()
    assert json.loads(text.rstrip(",\n") + "]") == events[:-1]


def test_a_killed_ranks_file_is_read_up_to_its_last_run(tmp_path):
    example_folder(tmp_path, closed=False)
    path = files(tmp_path)[1]
    whole = path.read_text()
    last = whole.rindex('{"name":"train_step"')
    for end in (last, last + 10, len(whole) - 1):  # in and before the last line
        path.write_text(whole[:end])
        assert len(read_trace(path).heads) == 2
        assert read_folder(tmp_path).choose().count == 2


def test_times_are_on_the_clock_of_rank_0(tmp_path):
    run = example_run()
    writer = Writer(1, 1, (0, 1), "abc", offset_ns=12_345, error_ns=1_000)
    path = tmp_path / file_name(1)
    text = head_text(writer) + step_text(1, run.planned)
    path.write_text(text + run_text(run.ranks[1], run.planned, writer))
    trace = read_trace(path)
    assert trace.load(trace.heads[0]) == run.ranks[1].shifted(12_345)
    assert trace.writer == writer


def test_the_typical_run_has_the_median_time(tmp_path):
    runs = example_folder(tmp_path, runs=5)
    chosen = read_folder(tmp_path).choose()
    seconds = sorted(run.stats.seconds for run in runs)
    assert chosen.stats.seconds == pytest.approx(seconds[2])
    assert chosen.is_typical and chosen.count == 5


def test_files_of_an_earlier_job_are_left_out(tmp_path):
    example_folder(tmp_path, ranks=3)
    example_folder(tmp_path, ranks=2, session="new", started=2.0)
    folder = read_folder(tmp_path)
    assert [path.name for path in folder.ignored] == ["rank_2.trace.json"]
    assert len(folder.choose().ranks) == 2


def test_replicas_are_told_apart(tmp_path):
    runs = example_folder(tmp_path)
    for rank in (2, 3):
        writer = Writer(rank, rank - 2, (2, 3), "abc", 1.0)
        run = runs[0].ranks[rank - 2].shifted(777)
        text = head_text(writer) + step_text(rank, runs[0].planned)
        text += run_text(run, runs[0].planned, writer)
        (tmp_path / file_name(rank)).write_text(text)
    folder = read_folder(tmp_path)
    assert folder.choose().group == (0, 1)
    assert folder.choose(replica=1).group == (2, 3)
    assert "replica=2; there are 0..1" in fails(folder.choose, None, None, 2)


# What cannot be read.


def test_a_folder_without_traces(tmp_path):
    assert fails(read_folder, tmp_path / "no") == f"no such folder: {tmp_path / 'no'}"
    assert "rank_<k>.trace.json is missing" in fails(read_folder, tmp_path)


def test_a_missing_rank_run_and_step(tmp_path):
    example_folder(tmp_path, ranks=3)
    folder = read_folder(tmp_path)
    assert "has complete runs 0..2" in fails(folder.choose, None, 3)
    assert "there are ['train_step']" in fails(folder.choose, "eval", None)
    files(tmp_path)[1].unlink()
    folder = read_folder(tmp_path)
    assert "missing=['rank_1.trace.json']" in fails(folder.choose)


def test_no_complete_run(tmp_path):
    example_folder(tmp_path, runs=1)
    path = files(tmp_path)[0]
    path.write_text(path.read_text().split('{"name":"0F0"')[0])
    assert "no run of a step is complete" in fails(read_folder(tmp_path).choose)


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda lines: [], "not a trace of smp_tf, or an empty one: file="),
        (lambda lines: ["{}"], "not a trace of smp_tf, or an empty one: file="),
        (lambda lines: ["[", '{"name":"other"},'], "not a trace of smp_tf: file="),
        (lambda lines: [*lines[:9], "garbage", *lines[9:]], "line=10"),
        (lambda lines: [*lines[:9], '{"name":}', *lines[9:]], "line="),
        (lambda lines: [*lines[:6], *lines[8:]], "line="),
        (lambda lines: [line.replace("[0,1]", "[0]") for line in lines], "line="),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path, damage, text):
    example_folder(tmp_path)
    path = files(tmp_path)[0]
    lines = path.read_text().splitlines()
    path.write_text("".join(f"{line}\n" for line in damage(lines)))

    def use():
        folder = read_folder(tmp_path)
        for place in range(3):
            folder.choose(place=place)

    assert text in fails(use) and str(path) in fails(use)


def test_another_version(tmp_path):
    example_folder(tmp_path)
    path = files(tmp_path)[0]
    path.write_text(path.read_text().replace('"format":1', '"format":2'))
    error = fails(read_folder, tmp_path)
    assert "another version" in error and "format=2; this version reads 1" in error


def test_binary_files_are_no_traces(tmp_path):
    (tmp_path / file_name(0)).write_bytes(b"\xff\xfe\x00")
    assert "cannot read a trace" in fails(read_folder, tmp_path)


# All ranks in one file.


def test_merged_ranks_have_arrows_and_a_curve_of_bytes(tmp_path):
    runs = example_folder(tmp_path, ranks=2, microbatches=4, runs=2)
    events = json.loads("".join(merged_text(read_folder(tmp_path))))
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        "rank 0 (partition 0)",
        "rank 1 (partition 1)",
    }
    starts = {e["id"]: e for e in events if e["ph"] == "s"}
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    assert len(starts) == len(ends) == 2 * 8 and set(starts) == set(ends)
    for number, start in starts.items():
        assert start["pid"] != ends[number]["pid"]
        assert start["ts"] <= ends[number]["ts"]
    slices = [e for e in events if e["ph"] == "X" and e["cat"] == "call"]
    for arrow in [*starts.values(), *ends.values()]:
        assert any(
            s["pid"] == arrow["pid"] and s["ts"] <= arrow["ts"] <= s["ts"] + s["dur"]
            for s in slices
        )
    counters = [e for e in events if e["ph"] == "C"]
    assert max(e["args"]["bytes"] for e in counters) == max(
        run.stats.peak_bytes_in_flight for run in runs
    )
    assert counters[-1]["args"]["bytes"] == 0 and SIZE in {
        e["args"]["bytes"] for e in counters
    }


def test_the_tail_tells_what_was_lost():
    assert json.loads(tail_text(3, 12).splitlines()[0])["args"] == {
        "dropped_events": 12
    }
