"""What is seen of the partition: by default, with logging configured, as JSON."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.config import resolve
from smp_tf.plan.plan_step import plan_step
from smp_tf.plan.step_plan import StepPlan
from smp_tf.runtime.log import tell_partition
from tests.unit.one_process import session
from tests.unit.plan.example_graphs import chain


@pytest.fixture(autouse=True)
def no_session(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("SMP_LOG_JSON", raising=False)
    smp.shutdown()
    yield
    smp.shutdown()


def plan() -> StepPlan:
    return plan_step(chain(4), resolve({"partitions": 2}, 2), {}, {})


def test_it_is_a_table_and_a_line_of_json(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "earlier"}\n')
    with caplog.at_level(logging.INFO, "smp_tf"):
        tell_partition("train", plan(), path)
        tell_partition("other", plan(), None)
    texts = [record.getMessage() for record in caplog.records]
    table = smp.partition_table(plan())
    assert texts == [
        f"partition of step={name} schedule=interleaved\n{table}"
        for name in ("train", "other")
    ]
    earlier, line = path.read_text().splitlines()
    event = json.loads(line)
    assert json.loads(earlier) == {"event": "earlier"}
    assert (event["event"], event["step"], event["partitions"]) == (
        "partition", "train", 2,
    )  # fmt: skip
    assert event["time"].endswith("+00:00")


def test_a_disk_that_fills_up_ends_no_training(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tell_partition("train", plan(), tmp_path)  # a folder
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "cannot be written" in record.message


def test_a_log_that_cannot_be_written_is_told_by_init(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SMP_LOG_JSON", str(tmp_path / "nowhere" / "log.jsonl"))
    with pytest.raises(smp.ConfigError, match="SMP_LOG_JSON"):
        smp.init()
    assert not smp.is_initialized()


def test_a_file_that_cannot_be_followed_is_told_by_init(tmp_path: Path) -> None:
    path = tmp_path / "partition.json"
    with pytest.raises(smp.ConfigError, match="`partition_file`: cannot be read"):
        smp.init({"partition_file": path})
    plan().save(path)
    with pytest.raises(smp.ConfigError, match="`partitions` must be 1, as in the conf"):
        smp.init({"partition_file": path})
    assert not smp.is_initialized()


def stderr_of(script: str) -> list[str]:
    found = subprocess.run(
        [sys.executable, "-c", f"import logging, smp_tf as smp\n{script}"],
        check=True,
        timeout=60,
        capture_output=True,
        text=True,
    )
    return found.stderr.splitlines()


@pytest.mark.parametrize(
    ("before", "after", "lines"),
    [
        ("", "", ["told", "warned"]),
        ("", "smp.shutdown(); smp.init()", ["told", "warned"]),
        ("", "logging.getLogger('smp_tf').setLevel(logging.WARNING)", ["warned"]),
        ("logging.getLogger('smp_tf').setLevel(logging.WARNING)", "", ["warned"]),
        ("", "logging.basicConfig(format='* %(message)s')", ["* told", "* warned"]),
        ("logging.basicConfig(format='* %(message)s')", "", ["* warned"]),
        ("logging.basicConfig(format='* %(message)s', level=logging.INFO)", "",
         ["* told", "* warned"]),
        ("logging.getLogger('smp_tf').addHandler(logging.NullHandler())", "", []),
    ],
)  # fmt: skip
def test_what_a_script_sees(before: str, after: str, lines: list[str]) -> None:
    """Nothing twice, and nothing against a script's own configuration."""
    say = "log = logging.getLogger('smp_tf'); log.info('told'); log.warning('warned')"
    assert stderr_of("\n".join([before, "smp.init()", after, say])) == lines


def test_one_partition_is_nothing_to_tell(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("SMP_LOG_JSON", str(tmp_path / "log.jsonl"))
    dense = tf.keras.layers.Dense(2)

    class Tiny(smp.DistributedModel):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            return dense(x)

    model = Tiny()
    with caplog.at_level(logging.INFO, "smp_tf"), session():
        smp.step(lambda x: model(x))(tf.ones([2, 3]))
    assert not caplog.records and (tmp_path / "log.jsonl").read_text() == ""
