"""The examples run as a user runs them, for a moment."""

import os
import pathlib
import re
import signal
import subprocess
import sys

import pytest

from tests.ranks import ROOT

LIMIT_SECONDS = 150
EXAMPLES = {
    "keras_fit": ["--batch", "16", "--microbatches", "2"],
    "hf_bert": [
        *("--batch", "16", "--microbatches", "2", "--length", "16"),
        *("--vocabulary", "300", "--dim", "16"),
    ],
}


def output_of(command: list[str]) -> str:
    """What it prints; killed with all it started when it takes too long."""
    process = subprocess.Popen(
        command,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=LIMIT_SECONDS)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    assert process.returncode == 0, output
    return output


@pytest.mark.slow
@pytest.mark.timeout(LIMIT_SECONDS + 20)
@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("name", list(EXAMPLES))
def test_runs(name: str, size: int) -> None:
    pytest.importorskip("transformers" if name == "hf_bert" else "sklearn")
    launcher = pathlib.Path(sys.executable).with_name("horovodrun")
    launch = [str(launcher), "--gloo", "-np", str(size)] if size > 1 else []
    arguments = [*EXAMPLES[name], "--epochs", "1", "--steps", "3"]
    module = [sys.executable, "-m", f"smp_tf.examples.{name}"]
    output = output_of([*launch, *module, *arguments])
    (found,) = re.findall(r"test_accuracy=(\S+) .*ranks=(\d)", output)
    assert 0.0 <= float(found[0]) <= 1.0 and found[1] == str(size)
    assert len(re.findall(r"3/3 - .*loss: ", output)) == 1, "the bar of one rank only"


def test_a_missing_library_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "transformers.py").write_text("raise ImportError\n")
    found = subprocess.run(
        [sys.executable, "-m", "smp_tf.examples.hf_bert"],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=LIMIT_SECONDS,
    )
    assert found.returncode == 1
    assert 'pip install "transformers' in found.stderr
