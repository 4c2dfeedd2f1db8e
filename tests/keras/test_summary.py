"""``model.summary()``: Keras's figures, and the partition of each layer."""

import contextlib
import io
import re
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from tests.ranks import ranks
from tests.unit.one_process import session

K = tf.keras


def build(base: type) -> Any:
    class Net(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="net")
            self.d0 = K.layers.Dense(8, "relu", name="d0")
            self.drop = K.layers.Dropout(0.1, name="drop")
            self.norm = K.layers.BatchNormalization(name="norm")
            self.inner = K.Sequential(
                [
                    K.layers.Dense(300, input_shape=[8], name="e0"),
                    K.layers.Dense(3, name="e1"),
                ],
                name="inner",
            )
            self.own = self.add_weight("own", [3], initializer="ones")
            self.idle = K.layers.Dense(2, name="idle")

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = self.norm(self.drop(self.d0(x), training=training), training=training)
            return self.inner(x) * self.own

    return Net()


def summary(model: Any, **kwargs: Any) -> list[str]:
    lines: list[str] = []
    model.summary(print_fn=lines.append, **kwargs)
    return lines


def cells(lines: list[str]) -> dict[str, list[str]]:
    """Layer -> its other cells."""
    rows = [re.split(r" {2,}", line) for line in lines]
    return {
        row[0].strip("| ").split(" (")[0]: row[1:]
        for row in rows
        if len(row) >= 3 and "(" in row[0] and "type" not in row[0]
    }


def totals(lines: list[str]) -> list[str]:
    return [line for line in lines if re.search("otal|rainable params", line)]


def check_table() -> None:
    truth, model = build(K.Model), build(smp.DistributedModel)
    truth(tf.zeros([2, 4]))
    with pytest.raises(ValueError, match="built.*model='net'"):
        model.summary()
    model.build([2, 4])
    for listed in ({}, {"expand_nested": True}, {"layer_range": ["norm", "dr.*"]}):
        expected = cells(summary(truth, **listed))
        before = cells(summary(model, **listed))
        assert list(before) == list(expected)
        assert all(row[-1] == "-" for row in before.values())
    smp.step(lambda x: model(x)).plan(tf.zeros([4, 4]))
    lines = summary(model, expand_nested=True)
    expected = cells(summary(truth, expand_nested=True))
    found = cells(lines)
    assert {name: row[1] for name, row in found.items()} == {
        name: row[1].strip() for name, row in expected.items()
    }
    assert totals(lines) == totals(summary(truth))
    for layer in [*model.layers, *model.inner.layers]:
        owners = {
            spec.partition
            for spec, variable in zip(
                model.global_variable_specs, model.global_variables, strict=True
            )
            if any(variable is each for each in layer.weights)
        }
        if owners:
            assert {int(p) for p in found[layer.name][2].split(", ")} >= owners
    assert re.fullmatch(r"\d", found["drop"][2])  # no variables, but operations
    assert found["idle"][1:] == ["0 (unused)", "-"]
    by_partition = [
        int(re.findall(r"params: (\d+)", line)[0])
        for line in lines
        if line.startswith("Partition")
    ]
    assert len(by_partition) == smp.pp_size()
    assert sum(by_partition) == model.count_params() == truth.count_params()
    assert "Trainable" in summary(model, show_trainable=True)[2]
    with pytest.raises(ValueError, match="no layer matches.*nothing"):
        model.summary(layer_range=["d0", "nothing"])
    if smp.pp_size() > 1:
        assert {row[2] for row in found.values()} >= {"0", "1"}


def test_one_process() -> None:
    with session(microbatches=2):
        check_table()


@ranks(2, timeout=110)
def test_two_ranks() -> None:
    smp.init({"partitions": 2, "microbatches": 2})
    check_table()
    model = build(smp.DistributedModel)
    model.build([2, 4])
    lines = summary(model)
    assert smp.allgather(lines, smp.WORLD) == [lines] * 2
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        model.summary()
    assert printed.getvalue().splitlines() == (lines if smp.rank() == 0 else [])
    smp.shutdown()
