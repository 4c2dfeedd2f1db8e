"""Two ranks: each has the initial values of plain Keras, and only its own."""

import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.models.initial_values import every_initializer
from tests.ranks import ranks

MB = 2**20
WIDTH, DEPTH = 2048, 16  # 16 MB each, 256 MB in all


def seeded(base: type) -> Any:
    tf.keras.utils.set_random_seed(7)
    return every_initializer(base)


def local_and_remote(model: Any) -> tuple[list[Any], list[Any]]:
    local = model.variables
    mine = {id(variable) for variable in local}
    return local, [v for v in model.global_variables if id(v) not in mine]


def check_initial_values() -> Any:
    plain = seeded(tf.keras.Model)
    plain(tf.ones([2, 4]))
    model = seeded(smp.DistributedModel)
    step = smp.step(lambda x: model(x))
    step.plan(tf.ones([4, 4]))
    place = {id(v): i for i, v in enumerate(model.global_variables)}
    assert len(place) == len(plain.variables)
    for variable in model.variables:
        want = plain.variables[place[id(variable)]]
        np.testing.assert_array_equal(variable, want, want.name)
    indices = [place[id(variable)] for variable in model.variables]
    everywhere = sum(smp.allgather(indices, smp.WORLD), [])
    assert sorted(everywhere) == list(range(len(place)))
    for _ in range(2):  # and the step does run
        step(tf.ones([4, 4]))
    return model


def check_remote_values(model: Any) -> None:
    owner = 1 - smp.pp_rank()
    _, remote = local_and_remote(model)
    remote = [variable for variable in remote if "constant" not in variable.name]
    assert remote
    for variable in remote:
        for use in (
            lambda: variable.numpy(),
            lambda: variable + 1,
            lambda: variable.assign(tf.zeros(variable.shape, variable.dtype)),
            lambda: tf.function(lambda: variable.read_value())(),
        ):
            with pytest.raises(smp.SmpError, match=f"{variable.name}.*={owner};"):
                use()
        assert f"value on partition {owner}" in repr(variable)
    for layer in (model.ways, model.dense, model.conv, model.lstm, model.functional):
        if any(v is r for v in layer.weights for r in remote):
            with pytest.raises(smp.SmpError, match=f"partition={owner};"):
                layer.get_weights()


@ranks(2, timeout=110)
def test_each_rank_has_its_part_of_the_initial_values() -> None:
    smp.init({"partitions": 2, "microbatches": 2})
    check_remote_values(check_initial_values())
    smp.shutdown()


def resident_bytes() -> int:
    pages = pathlib.Path("/proc/self/statm").read_text().split()[1]
    return int(pages) * 4096


class Wide(smp.DistributedModel):
    def __init__(self) -> None:
        super().__init__(name="wide")
        self.own = self.add_weight("own", [WIDTH, WIDTH], initializer="normal")
        self.dense = [tf.keras.layers.Dense(WIDTH) for _ in range(DEPTH - 1)]

    def call(self, x: tf.Tensor) -> tf.Tensor:
        x = x @ self.own
        for layer in self.dense:
            x = layer(x)
        return x


@ranks(2, timeout=110)
def test_a_rank_allocates_its_share() -> None:
    smp.init({"partitions": 2, "microbatches": 2})
    tf.random.normal([8])  # what TensorFlow itself takes
    before = resident_bytes()
    model = Wide()
    model.build([2, WIDTH])
    assert resident_bytes() - before < 40 * MB
    smp.step(lambda x: model(x)).plan(tf.ones([2, WIDTH]))
    share = sum(int(np.prod(v.shape)) * 4 for v in model.variables)
    assert 100 * MB < share < 156 * MB
    taken = resident_bytes() - before
    assert share < taken < share + 70 * MB, f"{taken / MB:.0f} of {share / MB:.0f} MB"
    smp.shutdown()
