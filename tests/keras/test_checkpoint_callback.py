"""When a checkpoint is saved, and that each rank can save its own part."""

import pathlib
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.keras.scripts import crossentropy, data, dense_net
from tests.ranks import run_ranks

X, Y = data(24)


class Counting:
    """Stands in for a manager, in this test only."""

    def __init__(self) -> None:
        self.saved: list[int] = []
        self.model: Any = None

    def save(self) -> None:
        self.saved.append(int(self.model.optimizer.iterations))


@pytest.mark.parametrize(
    ("every", "expected"), [(1, [1, 2, 3, 4, 5, 6]), (4, [4]), ("epoch", [3, 6])]
)
def test_it_saves_when_it_should(every: Any, expected: list[int]) -> None:
    smp.init({"microbatches": 2})
    manager = Counting()
    model = manager.model = dense_net(smp.DistributedModel)
    model.compile("sgd", crossentropy())
    callback = smp.callbacks.CheckpointCallback(manager, every)
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[callback])
    smp.shutdown()
    assert manager.saved == expected


@pytest.mark.parametrize("every", [0, -1, 1.5, True, "batch"])
def test_wrong_arguments_are_refused(every: Any) -> None:
    with pytest.raises(smp.ConfigError, match="every="):
        smp.callbacks.CheckpointCallback(Counting(), every)
    with pytest.raises(smp.ConfigError, match="manager=3"):
        smp.callbacks.CheckpointCallback(3)


class OwnPart:
    """This rank's variables, which exist after the first batch."""

    def __init__(self, model: Any, folder: str) -> None:
        self.model, self.folder = model, folder
        self.manager: Any = None

    def save(self) -> None:
        if self.manager is None:
            own = {f"v{i}": v for i, v in enumerate(self.model.variables)}
            checkpoint = tf.train.Checkpoint(**own)
            self.manager = tf.train.CheckpointManager(checkpoint, self.folder, 2)
        self.manager.save()


def train(folder: str) -> tuple[list[str], bool]:
    smp.init({"microbatches": 2})
    model = dense_net(smp.DistributedModel)
    model.compile("sgd", crossentropy())
    manager = OwnPart(model, f"{folder}/{smp.rank()}")
    callback = smp.callbacks.CheckpointCallback(manager, 2)
    model.fit(X, Y, batch_size=8, epochs=2, verbose=0, callbacks=[callback])
    trained = [variable.numpy() for variable in model.variables]
    for variable in model.variables:
        variable.assign(tf.zeros_like(variable))
    manager.manager.restore_or_initialize()
    same = all(np.array_equal(a, b.numpy()) for a, b in zip(trained, model.variables))
    names = [pathlib.Path(path).name for path in manager.manager.checkpoints]
    smp.shutdown()
    return names, same


def test_each_rank_saves_its_part(tmp_path: pathlib.Path) -> None:
    for names, same in run_ranks(2, train, str(tmp_path), timeout=90):
        assert names == ["ckpt-2", "ckpt-3"] and same
