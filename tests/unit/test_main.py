"""``python -m smp_tf plan``: what it prints, what it refuses, how it exits."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from smp_tf.__main__ import bytes_of, main

EXAMPLE = "smp_tf.examples.char_gpt:build"


def run(capsys, monkeypatch, *arguments):
    """(exit code, printed lines, errors) of the command."""
    monkeypatch.setattr(sys, "argv", ["smp_tf", "plan", *arguments])
    code = main()
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err


def ranking(lines):
    """Rows of the ranking: lists of cells, without the place."""
    return [line.split()[1:] for line in lines[1 : lines.index("")]]


def test_combinations_are_ranked_and_the_best_explained(capsys, monkeypatch):
    options = "--partitions 1,2 --microbatches 2,4 --batch 8".split()
    code, lines, _ = run(capsys, monkeypatch, EXAMPLE, *options)
    assert code == 0
    rows = ranking(lines)
    assert sorted((p, m, name) for p, m, name, *_ in rows) == sorted(
        (p, m, name)
        for p in "12"
        for m in "24"
        for name in ("interleaved", "simple", "zero_bubble")
    )
    steps = [float(row[3]) for row in rows]
    assert steps[0] == 1.0 and steps == sorted(steps)
    partitions, microbatches, pipeline = rows[0][:3]
    best = f"partitions={partitions} microbatches={microbatches} pipeline={pipeline}"
    assert f"best: {best}" in lines
    assert sum(line.startswith("MiB at the fullest moment") for line in lines) == 1


def test_what_does_not_fit_comes_last_and_is_told(capsys, monkeypatch):
    options = "--partitions 1,2,4 --microbatches 4 --batch 8".split()
    _, lines, _ = run(capsys, monkeypatch, EXAMPLE, *options)
    fullest = sorted({float(row[5]) for row in ranking(lines)})
    limit = (fullest[0] + fullest[1]) / 2
    code, lines, _ = run(
        capsys, monkeypatch, EXAMPLE, *options, "--memory-limit", f"{limit}MiB"
    )
    fits = [row[6] for row in ranking(lines)]
    assert code == 0 and fits[0] == "yes" and fits == sorted(fits, reverse=True)
    assert "no" in fits
    code, lines, _ = run(capsys, monkeypatch, EXAMPLE, *options, "--memory-limit", "1M")
    assert code == 1 and {row[6] for row in ranking(lines)} == {"no"}
    assert any(line.startswith("nothing fits: memory_limit=1000000") for line in lines)


def test_what_is_not_possible_is_told_beside_the_rest(capsys, monkeypatch):
    options = "--partitions 2,500 --microbatches 3,4 --batch 8".split()
    code, lines, errors = run(capsys, monkeypatch, EXAMPLE, *options)
    assert code == 0 and {row[0] for row in ranking(lines)} == {"2"}
    assert "partitions=500" in errors and "microbatches=3" in errors
    options = "--partitions 500 --microbatches 4 --batch 8".split()
    assert run(capsys, monkeypatch, EXAMPLE, *options)[0] == 1


def test_the_best_is_explained_and_written_as_a_page(capsys, monkeypatch, tmp_path):
    """Also where the best schedule is not the configured one: the plan is its own."""
    path = tmp_path / "plan.html"
    options = "--partitions 2 --microbatches 4 --batch 8 --html".split()
    code, lines, _ = run(capsys, monkeypatch, EXAMPLE, *options, str(path))
    assert code == 0 and lines[-1] == f"wrote {path}"
    pipeline = ranking(lines)[0][2]
    assert f"partitions=2 microbatches=4 pipeline={pipeline}" in "\n".join(lines)
    why = lines.index("why there")
    assert lines[why + 1].startswith("0 | 1: ") and lines[why + 2] == ""
    page = path.read_text(encoding="utf-8")
    assert f"Schedule {pipeline};" in page and "on 2 partitions" in page


@pytest.mark.parametrize(
    "text, size",
    [("7", 7), ("16GB", 16 * 10**9), ("1.5GiB", 3 * 2**29), ("2k", 2000), ("3MB", 3e6)],
)
def test_sizes(text, size):
    assert bytes_of(text) == size


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([EXAMPLE, "--memory-limit", "much"], "not a size: 'much'"),
        ([EXAMPLE, "--memory-limit", "3iB"], "not a size"),
        ([EXAMPLE, "--partitions", "2,x"], "not numbers above 0: '2,x'"),
        (["smp_tf.examples.char_gpt"], "write module:function"),
        (["no_such_module:build"], "No module named 'no_such_module'"),
        (["smp_tf.examples.char_gpt:biuld"], "has no attribute 'biuld'"),
        ([EXAMPLE, "--html", "/no/such/folder/x.html"], "cannot write '/no/such/f"),
        ([EXAMPLE, "--html", "/"], "cannot write '/': Is a directory"),
    ],
)
def test_wrong_arguments(capsys, monkeypatch, arguments, complaint):
    monkeypatch.setattr(sys, "argv", ["smp_tf", "plan", *arguments])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2 and complaint in capsys.readouterr().err


def test_a_script_beside_the_caller(tmp_path):
    """As a user has it: a file of theirs, and the command."""
    (tmp_path / "mine.py").write_text(
        "import smp_tf as smp, tensorflow as tf\n"
        "class Model(smp.DistributedModel):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.a = tf.keras.layers.Dense(8)\n"
        "        self.b = tf.keras.layers.Dense(8)\n"
        "    def call(self, x, training=None):\n"
        "        return self.b(self.a(x))\n"
        "def build(batch):\n"
        "    return Model(), tf.zeros([batch, 4])\n"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-m", "smp_tf", "plan", "mine:build", "--partitions", "2"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "best: partitions=2" in result.stdout


def test_seconds_can_be_measured(capsys, monkeypatch):
    options = "--partitions 2 --microbatches 2 --batch 4 --profile".split()
    code, lines, _ = run(capsys, monkeypatch, EXAMPLE, *options)
    assert code == 0 and len(ranking(lines)) == 3
    assert any("measured" in line for line in lines)
