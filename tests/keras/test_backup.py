"""BackupAndRestore: a job that is killed and started again ends as one that was not.

Rank 1 exits in the middle of an epoch, without a word to anybody. The job is started
again, and weights, optimizers and history are those of a job that ran to its end, bit
for bit. A launch ends one story and begins the next one:

    launch 1   every story without a disturbance; story 1 until rank 1 dies
    launch 2   story 1 goes on; story 2 until rank 1 dies
    launch 3   story 2 goes on; ..
"""

import dataclasses
import os
import pathlib
import pickle
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.keras.backup import takes_one_iterator
from tests.ranks import Outcome, run_ranks, start_ranks

keras = tf.keras
EPOCHS, SIZE, ROWS = 4, 8, 44  # 5.5 batches in an epoch
DEATH = 17  # the exit code of rank 1


@dataclasses.dataclass(frozen=True)
class Story:
    """
    Attributes:
        save_freq: of the BackupAndRestore.
        dies: epoch and batch after which rank 1 exits.
        trained: epochs that the restarted job reports.
        config: of the session; by default two partitions.
    """

    save_freq: Any
    dies: tuple[int, int]
    trained: list[int]
    optimizer: Callable[[], Any]
    data: Callable[[], Any]
    config: dict[str, Any] = dataclasses.field(default_factory=dict)

    def __enter__(self) -> "Story":
        smp.init({"microbatches": 2, "timeout_s": 40.0, **self.config})
        return self

    def __exit__(self, *error: Any) -> None:
        smp.shutdown()


def arrays() -> tuple[Any, Any]:
    chance = np.random.default_rng(3)
    x = chance.standard_normal((ROWS, 6)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64)


def shuffled_arrays() -> dict[str, Any]:
    x, y = arrays()
    return {"x": x, "y": y, "batch_size": SIZE}


def shuffled_dataset() -> dict[str, Any]:
    """In another order in each epoch; its length is unknown."""
    data = tf.data.Dataset.from_tensor_slices(arrays()).shuffle(ROWS, seed=5)
    return {"x": data.batch(SIZE).filter(lambda x, y: True)}


def generator() -> dict[str, Any]:
    """One that goes on through all epochs."""
    x, y = arrays()

    def batches() -> Any:
        chance = np.random.default_rng(8)
        while True:
            chosen = chance.permutation(ROWS)[:SIZE]
            yield x[chosen], y[chosen]

    return {"x": batches(), "steps_per_epoch": 5}


def own_part() -> dict[str, Any]:
    """Of a replica."""
    data = tf.data.Dataset.from_tensor_slices(arrays())
    return {"x": smp.shard_dataset(data).shuffle(ROWS, seed=5).batch(SIZE // 2)}


def loss_scaled() -> Any:
    return keras.mixed_precision.LossScaleOptimizer(
        keras.optimizers.AdamW(0.01, use_ema=True), initial_scale=2.0**9
    )


STORIES = {
    "epochs": Story(
        "epoch", (2, 3), [2, 3], lambda: keras.optimizers.Nadam(0.01), shuffled_arrays
    ),
    "batches": Story(
        2,
        (1, 3),  # batch 9: the last backup is of batch 8
        [1, 2, 3],
        lambda: keras.optimizers.legacy.SGD(0.1, momentum=0.9),
        shuffled_dataset,
    ),
    "generator": Story(3, (2, 1), [1, 2, 3], loss_scaled, generator),
    "sharded": Story(
        2,
        (1, 3),
        [1, 2, 3],
        loss_scaled,
        own_part,
        {"partitions": 1, "horovod": True, "shard_optimizer_state": True},
    ),
}


class Dies(keras.callbacks.Callback):
    def __init__(self, after: tuple[int, int]) -> None:
        super().__init__()
        self.after, self.epoch = after, 0

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.epoch = epoch

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if smp.rank() == 1 and (self.epoch, batch) == self.after:
            os._exit(DEATH)


def network(story: Story) -> Any:
    keras.backend.clear_session()
    keras.utils.set_random_seed(2)

    class Net(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__(name="net")
            self.parts = [keras.layers.Dense(8, activation="tanh") for _ in range(3)]
            self.unused = keras.layers.Dense(8)  # has no gradient
            self.norm = keras.layers.BatchNormalization()
            self.drop = keras.layers.Dropout(0.25)
            self.noise = keras.layers.GaussianNoise(0.1)
            self.head = keras.layers.Dense(2)

        def call(self, x: Any) -> Any:
            self.unused(x)
            x = self.noise(x)
            for part in self.parts:
                x = part(x)
            return self.head(self.drop(self.norm(x)))

    model = Net()
    model.compile(
        story.optimizer(),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ["accuracy"],
    )
    return model


def state_of(model: Any, arguments: dict[str, Any] | None = None) -> Any:
    """(optimizer and weights of this rank, weights), after a ``fit`` if it is said."""
    if arguments is not None:
        model.fit(**arguments)
    kept = model.optimizer.variables
    state = [v.numpy() for v in (kept() if callable(kept) else kept)]
    weights = [v.numpy() for v in model.variables]
    return state + weights, weights


def train(story: Story, *callbacks: Any) -> Any:
    """(state of this rank, epochs, history)"""
    model = network(story)
    decay = keras.callbacks.LearningRateScheduler(lambda epoch, rate: rate * 0.9)
    history = model.fit(
        **story.data(), epochs=EPOCHS, callbacks=[*callbacks, decay], verbose=0
    )
    return state_of(model)[0], history.epoch, history.history


def run_stories(
    folder: str, undisturbed: list[str], goes_on: str | None, begins: str | None
) -> None:
    found = {}
    for name in undisturbed:
        with STORIES[name] as story:
            found[name] = train(story)
    if goes_on is not None:
        with STORIES[goes_on] as story:
            place = pathlib.Path(folder, goes_on)
            found[f"{goes_on} again"] = train(story, backup_of(folder, goes_on))
            smp.barrier()
            found[f"{goes_on} left"] = [path.name for path in place.rglob("*")]
    report = pathlib.Path(folder, f"{goes_on}.{os.environ['HOROVOD_RANK']}")
    report.write_bytes(pickle.dumps(found))
    if begins is not None:
        with STORIES[begins] as story:
            train(story, backup_of(folder, begins), Dies(story.dies))


def backup_of(folder: str, name: str) -> Any:
    return keras.callbacks.BackupAndRestore(f"{folder}/{name}", STORIES[name].save_freq)


class Interrupts(keras.callbacks.Callback):
    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        if self.model.optimizer.iterations == 14:  # epoch 2, batch 1
            raise RuntimeError("interrupted")


def run_interrupted(folder: str) -> dict[str, Any]:
    """In one process, by an exception, with the same model; and what is refused."""
    smp.init({"microbatches": 2, "timeout_s": 40.0})
    found: dict[str, Any] = {}
    for save_freq in (5, "epoch"):
        model = network(STORIES["epochs"])
        given = {**shuffled_arrays(), "shuffle": False, "epochs": EPOCHS, "verbose": 0}
        backup = keras.callbacks.BackupAndRestore(
            f"{folder}/{save_freq}", save_freq, delete_checkpoint=False
        )
        with pytest.raises(RuntimeError, match="interrupted"):
            model.fit(**given, callbacks=[backup, Interrupts()])
        history = model.fit(**given, callbacks=[backup])
        found[str(save_freq)] = *state_of(model), history.epoch, history.history
    # Ended, and started again: nothing is left to do, and the weights are there.
    model = network(STORIES["epochs"])
    history = model.fit(**given, callbacks=[backup])
    model.evaluate(**{k: given[k] for k in ("x", "y", "verbose")})
    found["ended"] = state_of(model)[1], history.epoch
    model = network(STORIES["epochs"])
    found["truth"] = *state_of(model, given), None, model.history.history

    class Derived(keras.callbacks.BackupAndRestore):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            pass

    with pytest.raises(smp.ConfigError, match="callback=Derived"):
        model.fit(**given, callbacks=[Derived(folder)])
    # A folder in which one rank has lost its part.
    if smp.rank() == 1:
        shutil.rmtree(f"{folder}/epoch/rank_1")
    with pytest.raises(smp.SmpError, match=r"rank 0: \[24\]; rank 1: \[\]"):
        model.fit(**given, callbacks=[backup])
    return found


def killed(outcomes: list[Outcome]) -> bool:
    return [each.exit_code for each in outcomes] == [1, DEATH]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank has to tell of all stories."""
    folder = str(tmp_path_factory.mktemp("backups"))
    names = [*STORIES, None]
    found: list[dict[str, Any]] = [{}, {}]
    goes_on = None
    for name in names:
        undisturbed = [] if goes_on else list(STORIES)
        outcomes = start_ranks(
            2, run_stories, folder, undisturbed, goes_on, name, timeout=150
        )
        shown = "\n".join(map(str, outcomes))
        if name is None:
            assert [each.exit_code for each in outcomes] == [0, 0], shown
        else:
            assert killed(outcomes), shown
            assert "rank 1 died" in outcomes[0].output
        for rank in range(2):
            path = pathlib.Path(folder, f"{goes_on}.{rank}")
            found[rank].update(pickle.loads(path.read_bytes()))
        goes_on = name
    return found


@pytest.mark.timeout(700)
@pytest.mark.parametrize("name", STORIES)
def test_a_killed_job_goes_on_as_if_nothing_had_happened(
    told: list[dict[str, Any]], name: str
) -> None:
    trained = STORIES[name].trained
    for rank in range(2):
        truth, _, history = told[rank][name]
        found, epochs, rest = told[rank][f"{name} again"]
        assert epochs == trained
        assert rest == {key: history[key][-len(trained) :] for key in history}
        np.testing.assert_equal(found, truth)


def test_nothing_is_left_of_a_backup(told: list[dict[str, Any]]) -> None:
    for rank in range(2):
        assert [told[rank][f"{name} left"] for name in STORIES] == [[]] * len(STORIES)


@pytest.mark.timeout(200)
def test_a_training_goes_on_in_the_same_process(tmp_path: pathlib.Path) -> None:
    for found in run_ranks(2, run_interrupted, str(tmp_path), timeout=150):
        truth, weights, _, history = found["truth"]
        for save_freq, trained in (("5", [1, 2, 3]), ("epoch", [2, 3])):
            state, _, epochs, rest = found[save_freq]
            assert epochs == trained
            assert rest == {k: history[k][-len(trained) :] for k in rest}
            np.testing.assert_equal(state, truth)
        ended, epochs = found["ended"]
        assert epochs == []
        np.testing.assert_equal(ended, weights)


def test_which_data_goes_on_from_epoch_to_epoch() -> None:
    data = tf.data.Dataset.range(6)
    cases = [
        (np.zeros(3), None, True),
        ([np.zeros(3), np.zeros(3)], None, True),
        ({"a": np.zeros(3)}, None, True),
        ([1.0, 2.0], None, False),
        (iter([1]), 2, True),
        (data, None, False),
        (data, 6, False),
        (data, 3, True),
        (data.repeat(), 6, True),
    ]
    for x, steps, expected in cases:
        assert takes_one_iterator(x, steps) == expected, (x, steps)
