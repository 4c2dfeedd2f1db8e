"""``smp.distribute`` in one process: the object, its copies, and what is refused."""

import copy
import logging
import pickle
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.models.ready_made import FunctionalSubclass, Subclass, functional, sequential
from tests.unit.one_process import session

INPUTS = [np.ones([4, 6], "f"), np.ones([4, 6], "f")]


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with session(microbatches=2):
        yield


def run(model: Any, *inputs: Any) -> list[np.ndarray]:
    """The outputs of a step."""
    outputs = smp.step(lambda *x: model(list(x) if len(x) > 1 else x[0]))(*inputs)
    return [output.merge().numpy() for output in tf.nest.flatten(outputs)]


def test_it_is_the_same_object_and_still_what_it_was() -> None:
    plain = functional()
    kind, config, weights = type(plain), plain.get_config(), plain.get_weights()
    variables = list(plain.weights)
    paths = tf.train.Checkpoint(plain).restore  # made before, used after
    model = smp.distribute(plain)
    assert model is plain
    assert isinstance(model, smp.DistributedModel) and isinstance(model, kind)
    assert type(model).__name__ == kind.__name__
    assert model.get_config() == config and callable(paths)
    assert all(a is b for a, b in zip(model.weights, variables, strict=True))
    for one, other in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert smp.distribute(model) is model  # again
    assert type(smp.distribute(functional())) is type(model)
    own = smp.DistributedModel()
    assert smp.distribute(own) is own


def test_outputs_are_those_of_the_plain_model() -> None:
    expected = [t.numpy() for t in tf.nest.flatten(functional()(INPUTS))]
    found = run(smp.distribute(functional()), *INPUTS)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-6)


def test_it_is_called_inside_steps_only() -> None:
    model = smp.distribute(functional())
    with pytest.raises(smp.SmpError, match=rf"smp\.step.*model='{model.name}'"):
        model(INPUTS)


def test_copies_are_plain_models() -> None:
    model = smp.distribute(functional())
    run(model, *INPUTS)
    copies = [
        tf.keras.models.clone_model(model),
        type(model).from_config(model.get_config()),
        tf.keras.models.model_from_json(model.to_json()),
        copy.deepcopy(model),
        pickle.loads(pickle.dumps(model)),
    ]
    for each in copies:
        assert not isinstance(each, smp.DistributedModel)
        each.set_weights(model.get_weights())
        run(smp.distribute(each), *INPUTS)
    for one, other in zip(copies[3].get_weights(), model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    model = smp.distribute(FunctionalSubclass(units=5))
    clone = tf.keras.models.clone_model(model)
    assert type(clone) is FunctionalSubclass and clone.units == 5


def test_checkpoints_have_the_same_paths(tmp_path: Any) -> None:
    plain = functional()
    plain.save_weights(tmp_path / "weights")
    model = smp.distribute(functional())
    model.set_weights([0.0 * weight for weight in model.get_weights()])
    model.load_weights(tmp_path / "weights").assert_consumed()
    for one, other in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_variables_of_a_model_that_is_not_built_wait() -> None:
    for make in (sequential, Subclass):
        expected = []
        for convert in (lambda model: model, smp.distribute):
            tf.keras.utils.set_random_seed(1)
            model = convert(make())
            model.build([None, 6])
            kinds = {type(variable).__name__ for variable in model.trainable_weights}
            assert ("DeferredVariable" in kinds) == (convert is smp.distribute)
            expected.append(model.get_weights())
        for one, other in zip(*expected, strict=True):
            np.testing.assert_array_equal(one, other)


def test_it_forgets_what_was_traced_for_the_whole_model() -> None:
    model = tf.keras.Sequential([tf.keras.Input([6]), tf.keras.layers.Dense(3)])
    model.compile("sgd", "mse")
    model.fit(np.ones([4, 6]), np.ones([4, 3]), verbose=0)
    model.predict(np.ones([4, 6]), verbose=0)
    model.evaluate(np.ones([4, 6]), np.ones([4, 3]), verbose=0)
    model = smp.distribute(model)
    assert model.train_function is model.test_function is model.predict_function is None


def test_state_of_an_optimizer_is_told(caplog: Any) -> None:
    model = tf.keras.Sequential([tf.keras.Input([6]), tf.keras.layers.Dense(3)])
    model.compile("adam", "mse")
    smp.distribute(model)
    assert not caplog.records
    model = tf.keras.Sequential([tf.keras.Input([6]), tf.keras.layers.Dense(3)])
    model.compile("adam", "mse")
    model.fit(np.ones([4, 6]), np.ones([4, 3]), verbose=0)
    with caplog.at_level(logging.WARNING, "smp_tf"):
        smp.distribute(model)
    (record,) = caplog.records
    assert "Compile again" in record.message and "optimizer=Adam" in record.message


def of_module(name: str) -> Any:
    """An instance of a class that another library has."""
    return types.new_class("Model", (), exec_body=lambda n: n.update(__module__=name))()


@pytest.mark.parametrize(
    "model, complaint",
    [
        (lambda x: x, "forward pass"),
        (tf.keras.layers.Dense(3), r"Sequential\(\[layer\]\)"),
        (FunctionalSubclass, "make an instance"),
        (of_module("keras.src.models.model"), "is of Keras 3.*tf_keras"),
        (of_module("torch.nn.modules"), r"TF\* classes"),
    ],
)
def test_what_is_no_model_of_keras_2(model: Any, complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        smp.distribute(model)


def test_a_strategy_is_refused() -> None:
    with tf.distribute.OneDeviceStrategy("/cpu:0").scope():
        model = tf.keras.Sequential([tf.keras.Input([6]), tf.keras.layers.Dense(3)])
    with pytest.raises(ValueError, match="strategy=OneDeviceStrategy"):
        smp.distribute(model)


def test_it_can_be_planned() -> None:
    model, inputs = functional(), list(map(tf.constant, INPUTS))
    with pytest.raises(TypeError, match=r"smp.plan\(smp.distribute\(model\)"):
        smp.plan(model, inputs, partitions=2)
    weights = model.get_weights()
    example = ([tf.zeros([4, 6]), tf.zeros([4, 6])],)
    found = smp.plan(smp.distribute(model), example, partitions=2, microbatches=2)
    assert {s.partition for s in found.plan.segments.segments} == {0, 1}
    for one, other in zip(model.get_weights(), weights, strict=True):
        np.testing.assert_array_equal(one, other)
