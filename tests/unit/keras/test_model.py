"""DistributedModel in one process: where it may be called, which variables it shows."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.frontend.hooks import recording
from smp_tf.runtime.placement import Placement
from tests.models import mlp
from tests.unit.one_process import session


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with session(microbatches=2):
        yield


class Normed(smp.DistributedModel):
    """Trainable and other weights, and a nested model."""

    def __init__(self) -> None:
        super().__init__(name="normed")
        self.dense = tf.keras.layers.Dense(4)
        self.norm = tf.keras.layers.BatchNormalization()
        self.inner = tf.keras.Sequential([tf.keras.layers.Dense(3, input_shape=[4])])

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return self.inner(self.norm(self.dense(x), training=training))


def test_calling_outside_a_step_raises_and_says_so() -> None:
    model = Normed()
    for call in (model, tf.function(lambda x: model(x))):
        with pytest.raises(smp.SmpError, match=r"smp\.step.*model='normed'"):
            call(tf.zeros([2, 3]))
    smp.shutdown()
    with pytest.raises(smp.NotInitializedError, match=r"DistributedModel \(normed\)"):
        model(tf.zeros([2, 3]))


def test_same_initial_values_as_plain_keras() -> None:
    tf.keras.utils.set_random_seed(7)
    plain = mlp(tf.keras.Model)
    plain(tf.zeros([1, 5]))
    tf.keras.utils.set_random_seed(7)
    model = mlp(smp.DistributedModel)
    smp.step(lambda x: model(x))(tf.zeros([2, 5]))
    assert len(plain.variables) == len(model.variables) == 10
    for one, other in zip(plain.variables, model.variables):
        np.testing.assert_array_equal(one, other)


def test_variables_are_the_local_ones_outside_and_all_inside_of_steps() -> None:
    model = Normed()
    inside = []

    @smp.step
    def step(x: Any) -> Any:
        y = model(x, training=True)
        inside.append(len(model.trainable_variables))
        return y

    assert model.placement is None and len(model.global_variables) == 2
    step(tf.zeros([4, 3]))
    names = [variable.name for variable in model.global_variables]
    assert len(names) == 8 and len(set(names)) == 8
    assert [variable.name for variable in model.variables] == names
    # As on rank 0 of 2: the second half belongs to another partition.
    owner = {
        id(variable.handle): int(i >= 4)
        for i, variable in enumerate(model.global_variables)
    }
    model.place(Placement(model.placement.session, owner, {}))
    every = model.global_variables
    assert [id(v) for v in model.weights] == [id(v) for v in every[:4]]
    assert [id(v) for v in model.variables] == [id(v) for v in every[:4]]
    assert {v.name for v in model.trainable_variables} == {
        v.name for v in every[:4] if v.trainable
    }
    assert {v.name for v in model.non_trainable_variables} == {
        v.name for v in every[:4] if not v.trainable
    }
    assert inside == [6]
    with recording.tracing(recording.Recorder()):  # as when the step is traced again
        assert len(model.trainable_variables) == 6 and len(model.variables) == 8
    smp.shutdown()  # without a session nothing is remote
    assert model.placement is None and len(model.weights) == 8


def test_the_placement_is_no_part_of_checkpoints_and_weights() -> None:
    model = Normed()
    smp.step(lambda x: model(x))(tf.zeros([2, 3]))
    assert model.placement is not None
    assert not any("smp" in name for name in model._trackable_children())
    assert getattr(smp.DistributedModel, recording.DISTRIBUTED_MARK)


def test_nested_distributed_models() -> None:
    """One DistributedModel inside another: its variables count once."""

    class Outer(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__(name="outer")
            self.part = Normed()

        def call(self, x: tf.Tensor) -> tf.Tensor:
            return self.part(x) * 2.0

    model = Outer()
    plan = smp.step(lambda x: model(x)).plan(tf.zeros([2, 3]))
    names = [variable.name for variable in model.global_variables]
    assert len(names) == len(set(names)) == 8
    assert sorted(plan.owner) == list(range(8))
    owner = {id(v.handle): i % 2 for i, v in enumerate(model.global_variables)}
    for placed in (model, model.part):
        placed.place(Placement(model.placement.session, owner, {}))
    assert [v.name for v in model.variables] == names[::2]
    assert [v.name for v in model.global_variables] == names


def test_a_model_made_from_tensors_is_told_of_distribute() -> None:
    inputs = tf.keras.Input([3])
    outputs = tf.keras.layers.Dense(2)(inputs)
    for make in (
        lambda: smp.DistributedModel(inputs, outputs),
        lambda: smp.DistributedModel(inputs={"a": inputs}, outputs=[outputs]),
    ):
        with pytest.raises(TypeError, match=r"smp\.distribute\(tf\.keras\.Model"):
            make()
    Normed()  # Keras has not touched the classes
