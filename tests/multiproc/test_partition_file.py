"""A partition planned in one process and followed by two; what they say about it.

The plan is made as before a launch, with another batch, number of microbatches and loss
than the job has.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from tests.ranks import start_ranks

NAMES = [f"dense_{i}" for i in range(4)]


class Stack(smp.DistributedModel):
    def __init__(self) -> None:
        super().__init__(name="stack")
        self.dense = [tf.keras.layers.Dense(6, name=name) for name in NAMES]

    def call(self, x: tf.Tensor) -> tf.Tensor:
        for layer in self.dense:
            x = x + layer(x)
        return x


def train() -> list[str]:
    """Train and evaluate once; layers whose weights are here."""
    model = Stack()

    @smp.step
    def train_step(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @smp.step
    def evaluate(x: tf.Tensor) -> Any:
        return model(x)

    for batch in (4, 8):  # two signatures
        train_step(tf.ones([batch, 6]))
    evaluate(tf.ones([4, 6]))
    return list(dict.fromkeys(v.name.split("/")[-2] for v in model.variables))


def follow(saved: str, edited: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for what, path in (("saved", saved), ("edited", edited)):
        smp.init({"microbatches": 2, "partition_file": path})
        found[what] = train()
        smp.shutdown()
    mine = saved if smp_rank() == 0 else edited
    with pytest.raises(smp.ConfigError) as caught:
        smp.init({"microbatches": 2, "partition_file": mine})
    found["differing"] = str(caught.value)
    with pytest.raises(smp.SmpError) as caught_by_all:
        smp.init({"partition_file": saved if smp_rank() == 0 else f"{saved}.lost"})
    found["lost"] = str(caught_by_all.value)
    assert not smp.is_initialized()
    return found


def smp_rank() -> int:
    """Known before ``smp.init``, which is what fails here."""
    from smp_tf.launch import launch

    return launch().rank


def layers_by_partition(path: Path) -> list[list[str]]:
    found: list[list[str]] = [[], []]
    for row in json.loads(path.read_text())["atoms"]:
        if row["variables"]:
            found[row["partition"]] += [name.split("/")[-1] for name in row["layers"]]
    return found


def test_two_ranks_follow_a_file_and_tell_it_once(tmp_path: Path) -> None:
    smp.shutdown()
    saved, edited = tmp_path / "saved.json", tmp_path / "edited.json"
    smp.plan(Stack(), tf.ones([32, 6]), partitions=2, microbatches=8).save(saved)
    content = json.loads(saved.read_text())
    for row in content["atoms"]:
        row["partition"] = 1 if row["layers"] == ["stack/dense_3"] else 0
    edited.write_text(json.dumps(content))
    assert layers_by_partition(edited) == [NAMES[:3], NAMES[3:]]
    assert layers_by_partition(saved) == [NAMES[:2], NAMES[2:]]

    log = tmp_path / "log.jsonl"
    outcomes = start_ranks(
        2, follow, str(saved), str(edited), timeout=90, env={"SMP_LOG_JSON": str(log)}
    )
    shown = "\n".join(map(str, outcomes))
    assert [outcome.exit_code for outcome in outcomes] == [0, 0], shown
    for path in (saved, edited):
        owned = [outcome.value[path.stem] for outcome in outcomes]
        assert owned == layers_by_partition(path), shown
    for outcome in outcomes:
        text = outcome.value["differing"]
        assert "the configuration differs between ranks: `partition_file`" in text
        assert "on rank 0" in text and "on rank 1" in text and "files" in text
        assert "saved.json.lost" in outcome.value["lost"], shown

    # One table and one line for each of the two jobs: not for every signature, nor for
    # the step that evaluates.
    for outcome, tables in zip(outcomes, (2, 0), strict=True):
        assert outcome.output.count("partition of step=train_step") == tables, shown
        assert outcome.output.count("partition of step=") == tables, shown
        assert outcome.output.count("compute share") == tables, shown
    events = [json.loads(line) for line in log.read_text().splitlines()]
    assert [event["step"] for event in events] == ["train_step"] * 2
    for event, path in zip(events, (saved, edited), strict=True):
        named = [
            [name.split("/")[-1] for name in rank["layers"] if "/" in name]
            for rank in event["ranks"]
        ]
        assert named == layers_by_partition(path)
        assert event["microbatches"] == 2 and event["cuts"][0]["shape"] == [2, 6]
