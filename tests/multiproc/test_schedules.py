"""Schedules on real ranks: saved, edited by hand, chosen by the planner."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.ranks import run_ranks

DATA = np.random.default_rng(3).normal(size=(8, 6)).astype("float32")


class Stack(smp.DistributedModel):
    def __init__(self) -> None:
        super().__init__(name="stack")
        self.dense = [
            tf.keras.layers.Dense(6, "tanh", name=f"dense_{i}") for i in range(8)
        ]

    def call(self, x: tf.Tensor) -> tf.Tensor:
        for layer in self.dense:
            x = x + layer(x)
        return x


def train(config: dict[str, Any]) -> tuple[list[str], dict[str, np.ndarray]]:
    """(this rank's computations in order, gradients by variable)."""
    smp.init({"microbatches": 4, "timeout_s": 60, **config})
    tf.keras.utils.set_random_seed(1)
    model = Stack()

    @smp.step
    def train_step(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    gradients, _ = train_step(DATA)
    schedule = train_step.plan(DATA).schedule
    order = [str(a) for a in schedule.ranks[smp.pp_rank()] if a.kind.is_compute]
    found = {
        variable.name: gradient.reduce_mean().numpy()
        for variable, gradient in zip(model.trainable_variables, gradients, strict=True)
    }
    smp.shutdown()
    return order, found


def run_all(configs: dict[str, dict[str, Any]]) -> dict[str, Any]:
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    return {name: train(config) for name, config in configs.items()}


def test_every_schedule_gives_the_same_gradients(tmp_path: Path) -> None:
    """Also one that is written by hand, and pieces of the model in a loop and a V."""
    smp.shutdown()
    saved = tmp_path / "saved.csv"

    def step(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    step.__name__ = "train_step"
    model = Stack()
    plan = smp.plan(smp.step(step), tf.constant(DATA), partitions=2).plan
    plan.save_schedule(saved)
    lines = saved.read_text().splitlines()
    by_hand = "1F0,1F1,2B0,1F2,2B1,1F3,2B2,2B3"
    saved.write_text("\n".join([*lines[:-1], by_hand]) + "\n")

    configs: dict[str, dict[str, Any]] = {
        "interleaved": {},
        "simple": {"pipeline": "simple"},
        "by hand": {"schedule_file": str(saved)},
        "loop": {"virtual_stages": 2},
        "ZB-H1": {"pipeline": "zero_bubble", "active_microbatches": 2},
        "ZB-H2": {"pipeline": "zero_bubble", "active_microbatches": 3},
        "ZB-V": {"pipeline": "zero_bubble", "virtual_stages": 2},
        "auto": {"pipeline": "auto"},
    }
    found = run_ranks(2, run_all, configs, timeout=200)
    assert ",".join(found[1]["by hand"][0]) == by_hand
    truth = merged(found, "interleaved")
    assert len(truth) == 16
    for name in configs:
        gradients = merged(found, name)
        assert gradients.keys() == truth.keys(), name
        for variable, value in truth.items():
            np.testing.assert_array_equal(value, gradients[variable], f"{name}")
    for name in ("ZB-H1", "ZB-H2", "ZB-V"):
        kinds = {action.strip("0123456789") for action in found[1][name][0]}
        assert {"F", "I", "W"} <= kinds, name
    # F, F, I, W of two pieces on the rank that the V turns on; four stages in a loop.
    assert len(set(a[0] for a in found[0]["loop"][0])) == 4


def merged(found: list[Any], name: str) -> dict[str, np.ndarray]:
    ours, theirs = (each[name][1] for each in found)
    assert not ours.keys() & theirs.keys()
    return {**ours, **theirs}


def refuse(path: str) -> dict[str, str]:
    errors = {}
    with pytest.raises(smp.ScheduleError) as caught:
        train({"schedule_file": path})
    errors["schedule"] = str(caught.value)
    smp.shutdown()
    with pytest.raises(smp.PartitionError) as no_atoms:
        train({"virtual_stages": 30})
    errors["pieces"] = str(no_atoms.value)
    smp.shutdown()
    mine = {"schedule_file": path} if smp_rank() else {}
    with pytest.raises(smp.ConfigError) as differs:
        smp.init(mine)
    errors["differs"] = str(differs.value)
    return errors


def smp_rank() -> int:
    """Known before ``smp.init``."""
    from smp_tf.launch import launch

    return launch().rank


def test_what_cannot_run_raises_on_every_rank(tmp_path: Path) -> None:
    path = tmp_path / "wrong.csv"
    path.write_text("0F0,0F1,0F2,0F3,3B0,3B1,3B2,3B3\n2B0,1F0,1F1,1F2,1F3,2B1,2B2,2B3")
    for errors in run_ranks(2, refuse, str(path), timeout=120):
        assert "[2B0]" in errors["schedule"] and "rank 1 step 0" in errors["schedule"]
        assert "partitions=2 virtual_stages=30 atoms=" in errors["pieces"]
        assert "the configuration differs between ranks" in errors["differs"]
        assert "`schedule_file`: None on rank 0" in errors["differs"]
