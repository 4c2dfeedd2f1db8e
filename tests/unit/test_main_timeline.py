"""``python -m smp_tf timeline``: what it writes, what it refuses, how it exits."""

import json
import subprocess
import sys

import pytest

from smp_tf.__main__ import main
from tests.unit.report.timeline.example_timelines import example_folder


@pytest.fixture
def run(capsys, monkeypatch):
    """(exit code, printed text, errors) of the command."""

    def call(*arguments):
        command = ["smp_tf", "timeline", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        code = main()
        printed = capsys.readouterr()
        return code, printed.out, printed.err

    return call


@pytest.mark.parametrize(
    ("suffix", "first"),
    [("png", b"\x89PNG"), ("svg", b"<?xml"), ("html", b"<!doctype")],
)
def test_pictures(tmp_path, run, suffix, first):
    example_folder(tmp_path)
    output = tmp_path / f"out.{suffix}"
    code, out, err = run(tmp_path, "-o", output)
    assert (code, err) == (0, "") and output.read_bytes().startswith(first)
    assert out.startswith("step=train_step run=") and out.endswith(f"wrote {output}\n")


def test_a_run_by_its_number(tmp_path, run):
    example_folder(tmp_path)
    output = tmp_path / "out.svg"
    _, out, _ = run(tmp_path, "-o", output, "--step", 2, "--name", "train_step")
    assert out.startswith("step=train_step run=3: ")
    assert "run 2 of 0..2 " in output.read_text()


def test_all_ranks_in_one_trace(tmp_path, run):
    example_folder(tmp_path)
    output = tmp_path / "all.json"
    assert run(tmp_path, "-o", output)[0] == 0
    assert {event["pid"] for event in json.loads(output.read_text())} == {0, 1}


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (["no", "-o", "out.png"], "no such folder: no"),
        ([".", "-o", "out.png"], "no trace files in folder=."),
        (["good", "-o", "out.pdf"], "use one of .png, .svg, .html, .json"),
        (["good", "-o", "out"], "use one of .png, .svg, .html, .json"),
        (["good", "-o", "no/out.png"], "No such file or directory"),
        (["good", "-o", "no/out.json"], "No such file or directory"),
        (["good", "-o", "out.png", "--step", "9"], "complete runs 0..2"),
        (["good", "-o", "out.png", "--name", "x"], "there are ['train_step']"),
        (["good", "-o", "out.png", "--replica", "1"], "there are 0..0"),
        (["bad", "-o", "out.png"], "line=3"),
        (["bad", "-o", "out.json"], "line=3"),
    ],
)
def test_what_cannot_be_done_is_one_line(tmp_path, run, monkeypatch, options, error):
    monkeypatch.chdir(tmp_path)
    for name in ("good", "bad"):
        (tmp_path / name).mkdir()
        example_folder(tmp_path / name)
    path = tmp_path / "bad" / "rank_1.trace.json"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([*lines[:2], "{", *lines[2:]]) + "\n")
    code, out, err = run(*options)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert err.startswith("timeline: ") and error in err


def test_files_of_earlier_jobs_are_told(tmp_path, run):
    example_folder(tmp_path, ranks=3)
    example_folder(tmp_path, ranks=2, session="new", started=2.0)
    code, _, err = run(tmp_path, "-o", tmp_path / "out.svg")
    assert code == 0
    assert err == "timeline: of earlier jobs, left out: rank_2.trace.json\n"


def test_it_needs_no_tensorflow(tmp_path):
    example_folder(tmp_path)
    program = (
        "import sys; import smp_tf.__main__ as command\n"
        f"sys.argv = ['smp_tf', 'timeline', '{tmp_path}', '-o', '{tmp_path}/a.svg']\n"
        "assert command.main() == 0 and 'tensorflow' not in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60)
