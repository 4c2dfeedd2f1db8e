"""What a checkpoint leads to is saved, or refused: nothing is left out in silence."""

import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.unit.one_process import session

K = tf.keras


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with session():
        yield


def save(folder: pathlib.Path, **objects: Any) -> None:
    smp.CheckpointManager(tf.train.Checkpoint(**objects), str(folder)).save()


class State(tf.train.experimental.PythonState):
    def serialize(self) -> str:
        return "state"

    def deserialize(self, string_value: str) -> None:
        pass


def table(*keys: str) -> Any:
    found = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)
    if keys:
        found.insert(list(keys), list(range(len(keys))))
    return found


def test_tables_and_states_of_python_are_refused(tmp_path: pathlib.Path) -> None:
    module = tf.Module()
    module.words = table("a")
    texts = "(?=.*module/words: a MutableHashTable)(?=.*state: a State)"
    with pytest.raises(smp.ConfigError, match=texts):
        save(tmp_path, v=tf.Variable(1.0), module=module, state=State())
    assert not list(tmp_path.glob("*/*"))
    save(tmp_path, v=tf.Variable(1.0), empty=table())


@pytest.mark.parametrize("optimizers", [K.optimizers, K.optimizers.legacy])
def test_an_optimizer_of_variables_that_are_not_there(
    tmp_path: pathlib.Path, optimizers: Any
) -> None:
    variables = [tf.Variable([1.0, 2.0]), tf.Variable([3.0])]
    optimizer = optimizers.Adam(0.1)
    save(tmp_path, optimizer=optimizer)  # that has no slots yet
    optimizer.apply_gradients([(tf.ones_like(each), each) for each in variables])
    with pytest.raises(smp.ConfigError, match="optimizer: an optimizer of variables"):
        save(tmp_path, optimizer=optimizer)
    with pytest.raises(smp.ConfigError, match="optimizer: an optimizer of variables"):
        save(tmp_path, optimizer=optimizer, variables=variables[:1])
    save(tmp_path, optimizer=optimizer, variables=variables)


def test_what_keras_hangs_on_a_model_is_not_refused(tmp_path: pathlib.Path) -> None:
    adapted = K.layers.StringLookup()
    adapted.adapt(np.array(["x", "y", "y"]))
    known = K.layers.TextVectorization(vocabulary=["x", "y"])
    normalized = K.layers.Normalization()
    normalized.adapt(np.ones([4, 3], np.float32))
    dense = K.Sequential([normalized, K.layers.BatchNormalization(), K.layers.Dense(2)])
    inner = K.optimizers.Adam(0.1, use_ema=True, global_clipnorm=1.0)
    optimizer = K.mixed_precision.LossScaleOptimizer(inner)
    dense.compile(optimizer, "mse", metrics=["mae", K.metrics.AUC()])
    x = np.random.RandomState(0).rand(8, 3).astype(np.float32)
    dense.fit(x, x[:, :2] > 0.5, verbose=0)
    save(
        tmp_path,
        model=dense,
        layers=[adapted, known],
        optimizer=optimizer,
        metric=K.metrics.Mean(),
        generator=tf.random.Generator.from_seed(1),
        iterator=iter(tf.data.Dataset.range(3)),
        nested=tf.train.Checkpoint(v=tf.Variable(1)),
        things={"a": [tf.Variable(1)], "b": (tf.Variable(2),)},
    )


def test_a_text_is_saved_in_the_background(tmp_path: pathlib.Path) -> None:
    texts = [tf.Variable("a\0b\0"), tf.Variable(["c", "d"])]
    manager = smp.CheckpointManager(tf.train.Checkpoint(texts=texts), str(tmp_path))
    manager.save(blocking=False)
    texts[0].assign("")
    texts[1].assign(["", ""])
    assert manager.restore()
    assert texts[0].numpy() == b"a\0b\0" and list(texts[1].numpy()) == [b"c", b"d"]
