"""``smp.load_full_weights`` where several things look like the model."""

import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.unit.one_process import session

K = tf.keras
X = np.random.RandomState(0).rand(4, 5).astype(np.float32)


def net() -> Any:
    layers = [K.layers.Dense(3, use_bias=False), K.layers.Dense(2, use_bias=False)]
    model = K.Sequential(layers)
    model.build([None, 5])
    return model


def save(folder: pathlib.Path, **objects: Any) -> None:
    with session():
        checkpoint = tf.train.Checkpoint(**objects)
        smp.CheckpointManager(checkpoint, str(folder)).save()


def assert_weights(model: Any, expected: list[Any]) -> None:
    for one, other in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_array_equal(one, other)


def test_slots_of_an_optimizer_are_no_weights(tmp_path: pathlib.Path) -> None:
    trained, model = net(), net()
    trained.compile("adam", "mse")
    trained.fit(X, X[:, :2], verbose=0)
    save(tmp_path, optimizer=trained.optimizer, transformer=trained)
    smp.load_full_weights(model, tmp_path)
    assert_weights(model, trained.get_weights())


def test_of_several_models_one_is_chosen(tmp_path: pathlib.Path) -> None:
    student, average, model = net(), net(), net()
    before = model.get_weights()
    save(tmp_path / "two", student=student, average=average)
    with pytest.raises(smp.ConfigError, match=r"roots=\['average', 'student'\].*root="):
        smp.load_full_weights(model, tmp_path / "two")
    assert_weights(model, before)
    smp.load_full_weights(model, tmp_path / "two", root="student")
    assert_weights(model, student.get_weights())
    with pytest.raises(smp.ConfigError, match="teacher/.* is not in the checkpoint"):
        smp.load_full_weights(model, tmp_path / "two", root="teacher")
    save(tmp_path / "named", average=average, model=student)
    smp.load_full_weights(model, tmp_path / "named")
    assert_weights(model, student.get_weights())


def test_a_damaged_file_changes_nothing(tmp_path: pathlib.Path) -> None:
    save(tmp_path, model=net())
    (data,) = tmp_path.glob("mp_rank_0/ckpt-1.data-*")
    content = bytearray(data.read_bytes())
    content[-3] ^= 255  # of the second kernel: the first can be read
    data.write_bytes(content)
    model = net()
    before = model.get_weights()
    with pytest.raises(smp.ConfigError, match="wrong checksum.*/kernel.*by its prefix"):
        smp.load_full_weights(model, tmp_path)
    assert_weights(model, before)
