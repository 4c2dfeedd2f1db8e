"""Callbacks that do not agree, callbacks that raise, and ours."""

import pathlib
import re
from typing import Any

import numpy as np
import pytest

import smp_tf as smp
from tests.keras.callback_cases import (
    CONFIG,
    START,
    arrays,
    cases,
    fit,
    keras,
    network,
    rows_of,
    weights_of,
)
from tests.ranks import run_ranks, start_ranks

# --- callbacks that do not agree


class StopsOnRank1(keras.callbacks.Callback):
    """By the clock, say."""

    def __init__(self, hook: str) -> None:
        super().__init__()
        self.hook, self.batches = hook, 0
        setattr(self, hook, self.stop)

    def stop(self, number: int, logs: Any = None) -> None:
        if smp.rank() == 1 and number == 1:
            self.model.stop_training = True


def run_disagreeing(folder: str) -> dict[str, Any]:
    smp.init(CONFIG)
    found: dict[str, Any] = {}
    for hook in ("on_train_batch_end", "on_epoch_end"):
        model = network(smp.DistributedModel)
        batches: list[int] = []
        count = keras.callbacks.LambdaCallback(
            on_train_batch_end=lambda batch, logs: batches.append(batch)
        )
        history = fit(model, [StopsOnRank1(hook), count])
        found[hook] = batches, history.epoch
    model = network(smp.DistributedModel)
    rate = 0.01 * (1 + smp.rank())
    fit(model, [keras.callbacks.LearningRateScheduler(lambda epoch: rate)], epochs=1)
    fit(model, [StopsOnRank1("on_epoch_end")], epochs=1)
    found["rate"] = float(model.optimizer.learning_rate.numpy())
    # What a callback of rank 0 raises, all ranks raise.
    blocked = pathlib.Path(folder, "blocked")
    if smp.rank() == 0:
        blocked.write_text("no folder")
    smp.barrier()
    refusals = {
        "csv": keras.callbacks.CSVLogger(f"{blocked}/log.csv"),
        "restart": keras.callbacks.ModelCheckpoint(
            f"{folder}/model", load_weights_on_restart=True
        ),
        "alone": Evaluates(f"{folder}/alone.csv"),
        "root": smp.callbacks.BroadcastVariablesCallback(root_rank=1),
    }
    for name, callback in refusals.items():
        try:
            fit(network(smp.DistributedModel), [callback], epochs=1)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    return found


class Evaluates(keras.callbacks.CSVLogger):
    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        super().on_epoch_end(epoch, logs)
        self.model.evaluate(*arrays(), verbose=0)


def test_what_one_rank_decides_holds_on_all(tmp_path: pathlib.Path) -> None:
    first, second = run_ranks(2, run_disagreeing, str(tmp_path), timeout=120)
    assert first == second
    assert first["on_train_batch_end"] == ([0, 1], [0])
    assert first["on_epoch_end"] == ([0, 1, 2] * 2, [0, 1])
    assert first["rate"] == pytest.approx(0.01)
    assert first["csv"].startswith("NotADirectoryError") or "blocked" in first["csv"]
    assert first["restart"].startswith("ConfigError") and "/model'" in first["restart"]
    assert first["alone"].startswith("SmpError") and "evaluate" in first["alone"]
    assert first["root"].startswith("ConfigError") and "dp_size=1" in first["root"]


def run_raising() -> None:
    smp.init(CONFIG)

    def fail(batch: int, logs: Any) -> None:
        if smp.rank() == 1 and batch == 1:
            raise OSError("the disk of rank 1 is full")

    fails = keras.callbacks.LambdaCallback(on_train_batch_end=fail)
    fit(network(smp.DistributedModel), [fails])


def test_what_one_rank_raises_ends_all() -> None:
    first, second = start_ranks(2, run_raising, timeout=60)
    assert (first.exit_code, second.exit_code) == (1, 1)
    assert abs(first.ended - second.ended) < 5.0
    assert "the disk of rank 1 is full" in second.output
    assert "rank 1 failed" in first.output and "disk of rank 1" in first.output


# --- ours


def run_ours(folder: str) -> dict[str, Any]:
    smp.init(CONFIG)
    found: dict[str, Any] = {}
    model = network(smp.DistributedModel)
    partition = smp.callbacks.PartitionCallback()
    memory = smp.callbacks.MemoryCallback()
    callbacks = [
        keras.callbacks.CSVLogger(f"{folder}/log.csv"),
        partition,
        memory,
        smp.callbacks.PipelineMetricsCallback(),
        smp.callbacks.BroadcastVariablesCallback(),
    ]
    print(f"{START}logged", flush=True)
    found["history"] = fit(model, callbacks, epochs=3, verbose=1).history
    found["layers"] = partition.plan.num_partitions if partition.plan else 0
    found["memory"] = memory.uses
    print(f"{START}again", flush=True)
    fit(model, [smp.callbacks.PartitionCallback()], epochs=1)
    print(f"{START}end", flush=True)
    smp.shutdown()
    return found


def test_ours_show_figures_of_all_ranks(tmp_path: pathlib.Path) -> None:
    outcomes = start_ranks(2, run_ours, str(tmp_path), timeout=100)
    failed = [str(each) for each in outcomes if each.exit_code]
    assert not failed, "\n".join(failed)
    (first, second), printed = [o.value for o in outcomes], cases(outcomes[0])
    assert first == second and first["layers"] == 2
    history = first["history"]
    for name, limit in (("step_seconds", 60.0), ("bubble", 1.0), ("peak_mib", 1e5)):
        assert len(history[name]) == 3 and all(0 < v < limit for v in history[name])
        assert name in rows_of(tmp_path / "log.csv")[0]
    assert len(set(history["step_seconds"])) == 3
    for use in first["memory"]:
        assert 0 < use.before_bytes <= use.peak_bytes
        assert 0 < use.planned_bytes < 2**20
    table = "partition  layers"
    assert printed["logged"].count(table) == 1  # by the log
    assert printed["again"].count(table) == 1  # the log says nothing any more
    assert printed["logged"].count("planned MiB") >= 1
    assert re.search(r"step_seconds: [\d.e-]+ - bubble: ", printed["logged"])
    assert not any(text.strip() for text in cases(outcomes[1]).values())


def run_replicas() -> Any:
    """Two replicas of one partition each, that begin with other weights."""
    smp.init({"partitions": 1, "microbatches": 2, "timeout_s": 40.0})
    model = network(smp.DistributedModel)
    keras.utils.set_random_seed(smp.rank())  # the first batch makes the weights
    before: list[Any] = []
    look = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: before.append(weights_of(model))
    )
    callback = smp.callbacks.BroadcastVariablesCallback(root_rank=1)
    fit(model, [look, callback], epochs=1, shuffle=False)
    state = [variable.numpy() for variable in model.optimizer.variables]
    return before[0], weights_of(model) + state, smp.dp_size()


def test_replicas_begin_with_the_same_variables() -> None:
    (a, found, size), (b, other, _) = run_ranks(2, run_replicas, timeout=60)
    assert size == 2
    assert any(not np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    np.testing.assert_equal(found, other)
