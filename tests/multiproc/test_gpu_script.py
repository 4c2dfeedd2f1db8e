"""tests/gpu/run.sh over fakes of CUDA and NCCL: all of it but the GPU itself."""

import pathlib
import re
import subprocess

import pytest

SCRIPT = pathlib.Path(__file__).resolve().parents[1] / "gpu" / "run.sh"
WITH_TENSORFLOW = SCRIPT.with_name("with_tensorflow.sh")
SECONDS = 300  # compiles a dozen files


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(SCRIPT), *arguments], capture_output=True, text=True, timeout=SECONDS
    )


@pytest.mark.timeout(SECONDS + 20)
def test_runs_over_fakes():
    done = run("--fake")
    assert done.returncode == 0, done.stdout + done.stderr
    for name in ("all sizes and types", "overlap with", "kill -9 of a peer"):
        assert f"ok   {name}" in done.stdout
    # Figures of fakes say nothing; that they are there, and where, does.
    last = done.stdout.splitlines()[-1]
    assert re.fullmatch(r"bandwidth_64mb_ratio=[\d.]+ latency_ratio=[\d.]+", last), last


def test_says_what_is_missing(monkeypatch):
    """Hidden, or not there at all."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    done = run()
    assert done.returncode == 2
    assert re.fullmatch(r"tests/gpu: no GPU: [^\n]+\n", done.stderr), done.stderr


def test_refuses_what_it_does_not_know():
    done = run("--slow")
    assert (done.returncode, done.stdout) == (2, "")
    assert "usage: " in done.stderr


def test_says_what_is_not_run(tmp_path, monkeypatch):
    """With a Python that has none of what the tests need."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\nexit 1\n")
    python.chmod(0o755)
    monkeypatch.setenv("PYTHON", str(python))
    done = subprocess.run([str(WITH_TENSORFLOW)], capture_output=True, text=True)
    assert done.returncode == 3
    assert re.fullmatch(
        r"not run: the conformance tests [^\n]+ lacks horovod pytest [^\n]+\n",
        done.stdout,
    ), done.stdout
