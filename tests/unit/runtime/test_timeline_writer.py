"""A trace file that cannot grow: told once, and nobody is disturbed."""

import json
import logging
import os

import pytest

from smp_tf.report.timeline.file import Writer, read_trace
from smp_tf.runtime.timeline_writer import TraceFile
from tests.unit.report.timeline.example_timelines import example_run, run_text

WRITER = Writer(3, 1, (2, 3), "abc", 1.0)
RUN = example_run()


@pytest.fixture
def warnings(caplog):
    caplog.set_level(logging.WARNING, "smp_tf")
    return lambda: [record.getMessage() for record in caplog.records]


def write(file, count=1):
    for _ in range(count):
        file.write(RUN.planned, run_text(RUN.ranks[1], RUN.planned, WRITER))


def test_folders_are_made_and_files_are_read(tmp_path, warnings):
    file = TraceFile(tmp_path / "a" / "b", WRITER)
    write(file, 3)
    trace = read_trace(tmp_path / "a" / "b" / "rank_3.trace.json")
    assert trace.load(trace.heads[2]) == RUN.ranks[1] and trace.writer == WRITER
    file.close(0)
    json.loads(trace.path.read_text())
    assert warnings() == []


@pytest.mark.parametrize("where", ["/proc/smp_tf", "file"])
def test_a_folder_that_cannot_be_written_is_told_once(tmp_path, where, warnings):
    (tmp_path / "file").touch()
    folder = tmp_path / where
    file = TraceFile(folder, WRITER)
    write(file, 3)
    file.close(0)
    (text,) = warnings()
    assert text.startswith("rank 3: the trace cannot be written: ")
    assert f"trace={folder}/rank_3.trace.json. Training goes on" in text


def test_a_disk_that_fills_up_is_told_once(tmp_path, warnings):
    os.symlink("/dev/full", tmp_path / "rank_3.trace.json")
    file = TraceFile(tmp_path, WRITER)
    write(file, 3)
    file.close(0)
    (text,) = warnings()
    assert "No space left on device" in text


def test_a_file_does_not_grow_for_ever(tmp_path, warnings):
    file = TraceFile(tmp_path, WRITER, max_bytes=10_000)
    write(file, 100)
    file.close(0)
    path = tmp_path / "rank_3.trace.json"
    assert 5_000 < path.stat().st_size < 12_000
    json.loads(path.read_text())
    assert 1 < len(read_trace(path).heads) < 10
    (text,) = warnings()
    assert "the trace is full: it has 0.00954 MiB" in text


def test_lost_events_are_told(tmp_path, warnings):
    TraceFile(tmp_path, WRITER).close(17)
    (text,) = warnings()
    assert text.startswith("rank 3: 17 events were too many to write")
