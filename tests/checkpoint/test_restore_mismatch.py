"""A restore into something else than what was saved is refused, in time."""

import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.unit.one_process import session

K = tf.keras
X = np.random.RandomState(0).rand(4, 5).astype(np.float32)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with session():
        yield


def manager_of(folder: pathlib.Path, **objects: Any) -> Any:
    return smp.CheckpointManager(tf.train.Checkpoint(**objects), str(folder))


def numbers(more: bool = False) -> Any:
    data = tf.data.Dataset.range(9)
    return iter(data.shuffle(3).repeat().batch(2) if more else data)


@pytest.mark.parametrize(
    ("saved", "given", "text"),
    [
        ({}, {"it": numbers}, "saved without the states of iterators.*it"),
        ({"it": numbers}, {"it": numbers, "other": numbers}, "states of 1 iterators"),
        ({"it": numbers}, {"it": lambda: numbers(True)}, "of another dataset.*it"),
    ],
)
def test_other_iterators_leave_the_variables(
    tmp_path: pathlib.Path,
    saved: dict[str, Callable[[], Any]],
    given: dict[str, Callable[[], Any]],
    text: str,
) -> None:
    variable = tf.Variable(1.0)
    manager_of(tmp_path, v=variable, **{k: make() for k, make in saved.items()}).save()
    variable.assign(5.0)
    manager = manager_of(tmp_path, v=variable, **{k: f() for k, f in given.items()})
    with pytest.raises(smp.ConfigError, match=text):
        manager.restore()
    assert float(variable) == 5.0


OPTIMIZERS: dict[str, Callable[[], Any]] = {
    "adam": lambda: K.optimizers.Adam(0.05),
    "amsgrad": lambda: K.optimizers.Adam(0.05, amsgrad=True),
    "momentum": lambda: K.optimizers.SGD(0.05, momentum=0.9),
    "legacy adam": lambda: K.optimizers.legacy.Adam(0.05),
    "legacy amsgrad": lambda: K.optimizers.legacy.Adam(0.05, amsgrad=True),
    "legacy momentum": lambda: K.optimizers.legacy.SGD(0.05, momentum=0.9),
}


def job(kind: str) -> Any:
    layers = [K.layers.Dense(3), K.layers.Dense(2)]
    model = smp.distribute(K.Sequential(layers, name="net"))
    model.compile(OPTIMIZERS[kind](), "mse")
    return model


def fit(model: Any) -> None:
    model.fit(X, X[:, :2], verbose=0)


@pytest.mark.parametrize(
    ("saved", "given", "is_refused"),
    [
        ("adam", "momentum", True),
        ("momentum", "adam", True),
        ("adam", "amsgrad", True),
        ("amsgrad", "adam", True),
        ("adam", "adam", False),
        ("legacy amsgrad", "legacy adam", True),
        ("legacy adam", "legacy momentum", True),
        ("legacy adam", "legacy adam", False),
    ],
)
@pytest.mark.parametrize("is_before", [True, False])
def test_the_slots_of_another_optimizer(
    tmp_path: pathlib.Path, saved: str, given: str, is_refused: bool, is_before: bool
) -> None:
    model = job(saved)
    fit(model)
    manager_of(tmp_path, model=model, optimizer=model.optimizer).save()
    other = job(given)
    if not is_before:
        fit(other)
    manager = manager_of(tmp_path, model=other, optimizer=other.optimizer)

    def goes_on() -> None:
        manager.restore()
        fit(other)

    if not is_refused:
        goes_on()
        return
    # Before the first step nobody knows which slots there will be.
    text = "must be those that were saved.*optimizer/"
    with pytest.raises(smp.ConfigError, match=text):
        goes_on()
