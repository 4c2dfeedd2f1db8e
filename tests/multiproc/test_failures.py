"""Nobody hangs: whatever happens to rank 1, the others fail soon, and name it."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

import smp_tf as smp
from tests.ranks import ROOT, Outcome, start_ranks

CULPRIT = 1
STOP_SECONDS = 15
LIMIT_SECONDS = 10.0  # for every other rank to end after the culprit failed


def _fail(how: str) -> None:
    """Rank 1 fails; rank 0 waits for rank 1, and any other rank for rank 0."""
    # Not too short: TensorFlow's import may take some seconds longer on one rank.
    smp.init({"timeout_s": STOP_SECONDS if how == "stop" else 60.0})
    smp.barrier()
    if smp.rank() == CULPRIT:
        time.sleep(0.2)
        _fail_here(how)
    # A stopped process is only known to whoever waits for it.
    direct = smp.rank() == 0 or how == "stop"
    smp.recv_from(CULPRIT if direct else 0, smp.WORLD_RANK)


def _fail_here(how: str) -> None:
    if how == "raise":
        raise ValueError("boom")
    if how == "exit":
        sys.exit(3)
    if how == "interrupt":
        interrupt = (os.getpid(), signal.SIGINT)
        threading.Timer(0.3, os.kill, interrupt).start()
        smp.recv_from(0, smp.WORLD_RANK)
    names = {"kill": "SIGKILL", "terminate": "SIGTERM", "stop": "SIGSTOP"}
    os.kill(os.getpid(), getattr(signal, names[how]))
    time.sleep(60)


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize(
    ("how", "exit_code", "text"),
    [
        ("raise", 1, r"rank 1 failed: ValueError: boom"),
        ("kill", -signal.SIGKILL, r"rank 1 died"),
        ("exit", 3, r"rank 1 left the job"),
        ("terminate", -signal.SIGTERM, r"rank 1 failed: stopped by SIGTERM"),
        ("interrupt", -signal.SIGINT, r"rank 1 failed: KeyboardInterrupt"),
    ],
)
def test_the_others_name_the_rank_that_failed(
    how: str, exit_code: int, text: str, size: int
) -> None:
    outcomes = start_ranks(size, _fail, how, timeout=50)
    culprit = outcomes[CULPRIT]
    shown = "\n".join(map(str, outcomes))
    assert culprit.exit_code == exit_code, shown
    for outcome in _others(outcomes):
        assert outcome.exit_code == 1, shown
        assert re.search(rf"TransportError: .*{text}", outcome.output), shown
        assert outcome.ended - culprit.ended < LIMIT_SECONDS, shown


@pytest.mark.parametrize("size", [2, 3])
def test_a_stopped_rank_is_named_at_the_deadline(size: int) -> None:
    outcomes = start_ranks(size, _fail, "stop", timeout=70, endless=[CULPRIT])
    shown = "\n".join(map(str, outcomes))
    for outcome in _others(outcomes):
        assert outcome.exit_code == 1, shown
        text = f"rank 1 did not answer within timeout_s={STOP_SECONDS}"
        assert text in outcome.output, shown


def _differ() -> None:
    smp.init({"microbatches": 4 + 4 * (int(os.environ["HOROVOD_RANK"]) == CULPRIT)})


def test_configurations_that_differ_fail_everywhere() -> None:
    outcomes = start_ranks(3, _differ, timeout=50)
    for outcome in outcomes:
        assert outcome.exit_code == 1, outcome
        text = "`microbatches`: 4 on ranks 0, 2; 8 on rank 1"
        assert "ConfigError: the configuration differs" in outcome.output, outcome
        assert text in outcome.output, outcome


def _misspell() -> None:
    smp.init({"microbatch": 2} if os.environ["HOROVOD_RANK"] == "1" else None)


def test_a_rank_that_cannot_start_is_named_by_those_that_wait_for_it() -> None:
    outcomes = start_ranks(3, _misspell, timeout=50)
    for outcome in _others(outcomes):
        assert outcome.exit_code == 1, outcome
        assert "rank 1 failed: ConfigError: `microbatch`" in outcome.output, outcome
        assert outcome.ended - outcomes[CULPRIT].ended < LIMIT_SECONDS, outcome


SCRIPT = """
import hashlib, os, signal, time
import smp_tf as smp

smp.init()
smp.barrier()
if smp.rank() == 1:
    print(f"killed at {time.time()}", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
if smp.rank() == 2:  # busy outside Python, where no signal handler can run
    hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
smp.recv_from(1, smp.WORLD_RANK)
"""


def test_horovodrun_ends_and_the_survivors_name_the_dead(
    tmp_path: pathlib.Path,
) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    launcher = pathlib.Path(sys.executable).with_name("horovodrun")
    if not launcher.exists():
        pytest.skip("horovodrun is not installed beside this Python")
    environment = {
        **os.environ,
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
        "TF_CPP_MIN_LOG_LEVEL": "3",
    }
    command = [str(launcher), "--gloo", "-np", "3", sys.executable, str(script)]
    process = subprocess.run(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        timeout=100,
    )
    ended, output = time.time(), process.stdout
    assert process.returncode != 0, output
    killed = re.search(r"killed at ([\d.]+)", output)
    assert killed, output
    assert ended - float(killed[1]) < LIMIT_SECONDS, output
    survivors = re.findall(r"\[(\d)\]<stderr>:.*rank 1 died", output)
    assert set(survivors) == {"0", "2"}, output


def _others(outcomes: list[Outcome]) -> list[Outcome]:
    return [outcome for outcome in outcomes if outcome.rank != CULPRIT]
