"""Keras scripts, as users write them: the same text for plain Keras and for smp_tf.

Each takes a ``Maker`` and differs between the two in nothing else. They bring the traps
of ``fit``: remainders, weights, several outputs, schedules, clipping, shuffles.
"""

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf

keras = tf.keras
layers = tf.keras.layers

FLOATS = 2e-5
"""What float32 sums in another order leave after a dozen updates of such models."""


@dataclasses.dataclass(frozen=True)
class Maker:
    """What a script gets its models from.

    Attributes:
        base: class to subclass.
        wrap: what is done with a model of any other kind.
    """

    base: type
    wrap: Callable[[Any], Any]


@dataclasses.dataclass(frozen=True)
class Trained:
    """What a script leaves: figures by name, and the model."""

    figures: dict[str, Any]
    model: Any


@dataclasses.dataclass(frozen=True)
class FitScript:
    """
    Attributes:
        tolerance: of figures and weights against plain Keras, absolute and relative.
        truths: what plain Keras does the same with: whole "batches", "microbatches"
            that are cut by hand, or both.
    """

    name: str
    run: Callable[[Maker], Trained]
    tolerance: float = FLOATS
    truths: tuple[str, ...] = ("microbatches", "batches")


def data(rows: int, features: int = 6, classes: int = 3) -> tuple[Any, Any]:
    chance = np.random.default_rng(5)
    x = chance.standard_normal((rows, features)).astype(np.float32)
    return x, (x[:, 0] > 0).astype(np.int64) + (x[:, 1] > 0.5) % (classes - 1)


def crossentropy(**options: Any) -> Any:
    return keras.losses.SparseCategoricalCrossentropy(from_logits=True, **options)


def dense_net(base: type, **options: Any) -> Any:
    class Net(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="net")
            self.hidden = [
                layers.Dense(12, activation="tanh", **options) for _ in range(2)
            ]
            self.head = layers.Dense(3)

        def call(self, x: Any) -> Any:
            for layer in self.hidden:
                x = layer(x)
            return self.head(x)

    return Net()


def subclassed(make: Maker) -> Trained:
    """A remainder in training and validation, a regularizer, an accuracy."""
    model = dense_net(make.base, kernel_regularizer="l2")
    x, y = data(55)
    model.compile(keras.optimizers.Adam(0.01), crossentropy(), ["accuracy"])
    history = model.fit(
        x, y, batch_size=16, epochs=3, validation_split=0.2, verbose=0
    ).history
    figures = {
        **history,
        "evaluate": model.evaluate(x, y, batch_size=16, verbose=0),
        "predict": model.predict(x, batch_size=16, verbose=0),
    }
    return Trained(figures, model)


def functional(make: Maker) -> Trained:
    """Two inputs, two outputs, losses with weights, a schedule, tf.data with dicts."""
    left, right = keras.Input([6], name="left"), keras.Input([6], name="right")
    shared = layers.Dense(8, activation="tanh", name="shared")
    both = layers.Concatenate(name="both")([shared(left), shared(right)])
    hidden = layers.Dense(8, activation="tanh", name="hidden")(both)
    outputs = {
        "kind": layers.Dense(3, name="kind")(hidden),
        "size": layers.Dense(1, name="size")(layers.Add()([hidden, shared(left)])),
    }
    model = make.wrap(keras.Model({"left": left, "right": right}, outputs))
    x, y = data(40)
    dataset = tf.data.Dataset.from_tensor_slices(
        ({"left": x, "right": x[::-1]}, {"kind": y, "size": x[:, :1] * 2})
    )
    rate = keras.optimizers.schedules.ExponentialDecay(0.05, 2, 0.8)
    model.compile(
        keras.optimizers.SGD(rate, momentum=0.9),
        {"kind": crossentropy(), "size": "mse"},
        metrics={"kind": ["accuracy"], "size": ["mae"]},
        loss_weights={"kind": 0.7, "size": 0.3},
    )
    history = model.fit(
        dataset.shuffle(40, seed=3).batch(16),
        validation_data=dataset.batch(8),
        epochs=3,
        verbose=0,
    ).history
    predicted = model.predict(dataset.batch(8), verbose=0)
    predictions = {f"predict {name}": value for name, value in predicted.items()}
    return Trained({**history, **predictions}, model)


def normalized(make: Maker) -> Trained:
    """A convolutional Sequential with BatchNormalization, RMSprop, clipvalue."""
    model = make.wrap(
        keras.Sequential(
            [
                keras.Input([8, 8, 1]),
                layers.Conv2D(4, 3, use_bias=False),
                layers.BatchNormalization(momentum=0.8),
                layers.ReLU(),
                layers.Conv2D(6, 3, strides=2, use_bias=False),
                layers.BatchNormalization(momentum=0.8),
                layers.ReLU(),
                layers.Flatten(),
                layers.Dense(3),
            ]
        )
    )
    x = np.random.default_rng(1).random((48, 8, 8, 1), np.float32)
    y = (x.mean((1, 2, 3)) * 60).astype(np.int64) % 3
    model.compile(
        keras.optimizers.RMSprop(0.005, clipvalue=0.01), crossentropy(), ["accuracy"]
    )
    history = model.fit(x, y, batch_size=16, epochs=3, verbose=0, shuffle=True).history
    return Trained(
        {**history, "evaluate": model.evaluate(x, y, verbose=0, batch_size=48)}, model
    )


def weighted(make: Maker) -> Trained:
    """class_weight, sample_weight, weighted metrics, clipnorm for each gradient."""
    model = dense_net(make.base)
    x, y = data(42)
    model.compile(
        keras.optimizers.Adam(0.01, clipnorm=0.05),
        crossentropy(),
        metrics=["accuracy"],
        weighted_metrics=[keras.metrics.SparseCategoricalAccuracy(name="weighted")],
    )
    first = model.fit(
        x, y, batch_size=12, epochs=2, class_weight={0: 1.0, 1: 2.5, 2: 0.5}, verbose=0
    ).history
    weights = np.linspace(0.1, 2.0, len(x)).astype(np.float32)
    second = model.fit(
        x,
        y,
        sample_weight=weights,
        batch_size=12,
        epochs=2,
        validation_data=(x, y, weights),
        verbose=0,
    ).history
    return Trained({**{f"first {k}": first[k] for k in first}, **second}, model)


def generated(make: Maker) -> Trained:
    """A generator, steps_per_epoch, initial_epoch; AdamW with an average of weights."""
    model = dense_net(make.base)
    x, y = data(200)

    def batches() -> Iterator[Any]:
        while True:
            chosen = np.random.permutation(len(x))[:10]
            yield x[chosen], y[chosen]

    optimizer = keras.optimizers.AdamW(
        0.01, weight_decay=0.1, use_ema=True, ema_momentum=0.5
    )
    model.compile(optimizer, crossentropy(), ["accuracy"])
    history = model.fit(
        batches(), steps_per_epoch=3, initial_epoch=1, epochs=4, verbose=0
    ).history
    return Trained(history, model)


class Batches(keras.utils.Sequence):
    def __init__(self, x: Any, y: Any, size: int) -> None:
        self.x, self.y, self.size = x, y, size
        self.order = list(range(len(x)))

    def __len__(self) -> int:
        return -(-len(self.x) // self.size)

    def __getitem__(self, index: int) -> Any:
        chosen = self.order[index * self.size : (index + 1) * self.size]
        return self.x[chosen], self.y[chosen]

    def on_epoch_end(self) -> None:
        random.shuffle(self.order)


def sequence(make: Maker) -> Trained:
    """A Sequence that shuffles, with a remainder; a norm over the whole model."""
    model = dense_net(make.base)
    optimizer = keras.optimizers.SGD(0.5, momentum=0.5, global_clipnorm=0.1)
    model.compile(optimizer, crossentropy(), ["accuracy"])
    history = model.fit(Batches(*data(27), 8), epochs=3, verbose=0).history
    return Trained(history, model)


def own_losses(make: Maker) -> Trained:
    """add_loss, an own metric, compute_loss and compute_metrics; legacy Adam."""

    class Net(make.base):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__(name="net")
            self.hidden = layers.Dense(8, activation="tanh")
            self.head = layers.Dense(3, activity_regularizer="l2")
            self.seen = keras.metrics.Mean(name="seen")

        def call(self, x: Any) -> Any:
            h = self.hidden(x)
            self.add_loss(0.1 * tf.reduce_mean(tf.square(h)))
            return self.head(h)

        def compute_loss(self, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> Any:
            loss = super().compute_loss(x, y, y_pred, sample_weight)
            return loss + 0.01 * tf.reduce_mean(tf.abs(y_pred))

        def compute_metrics(self, x: Any, y: Any, y_pred: Any, weight: Any) -> Any:
            logs = super().compute_metrics(x, y, y_pred, weight)
            self.seen.update_state(tf.reduce_mean(y_pred, 1))
            return {**logs, "seen": self.seen.result()}

    model = Net()
    x, y = data(32)
    model.compile(keras.optimizers.legacy.Adam(0.01), crossentropy(), ["accuracy"])
    history = model.fit(x, y, batch_size=16, epochs=3, verbose=0).history
    return Trained(history, model)


def words(make: Maker) -> Trained:
    """An embedding, whose gradient is sparse, a mask and a GRU; Adamax."""
    model = make.wrap(
        keras.Sequential(
            [
                keras.Input([7], dtype="int64"),
                layers.Embedding(20, 6, mask_zero=True),
                layers.GRU(6),
                layers.Dense(3),
            ]
        )
    )
    chance = np.random.default_rng(2)
    lengths = chance.integers(3, 8, (32, 1))
    x = chance.integers(1, 20, (32, 7)) * (np.arange(7) < lengths)
    y = x.sum(1) % 3
    model.compile(keras.optimizers.Adamax(0.01), crossentropy(), ["accuracy"])
    history = model.fit(x, y, batch_size=16, epochs=2, verbose=0).history
    return Trained({**history, "predict": model.predict(x, verbose=0)}, model)


def by_hand(make: Maker) -> Trained:
    """train_on_batch, test_on_batch, predict_on_batch; Ftrl."""
    model = dense_net(make.base)
    model.compile(keras.optimizers.Ftrl(0.05), crossentropy(), ["accuracy"])
    x, y = data(30)
    figures: dict[str, list[Any]] = {"train": [], "test": [], "predict": []}
    for start in (0, 8, 16, 24):
        part = slice(start, start + 8)
        figures["train"].append(model.train_on_batch(x[part], y[part]))
        figures["test"].append(model.test_on_batch(x[part], y[part]))
    figures["predict"].append(model.predict_on_batch(x[:5]))
    return Trained(figures, model)


def summed(make: Maker) -> Trained:
    """A loss that adds the examples up, with a remainder; several batches at once."""
    model = dense_net(make.base)
    model.compile(
        keras.optimizers.SGD(0.01), crossentropy(reduction="sum"), steps_per_execution=2
    )
    history = model.fit(*data(30), batch_size=8, epochs=3, verbose=0).history
    return Trained(history, model)


def partly_weighted(make: Maker) -> Trained:
    """Two losses that are sums, sample weights for one of them, a remainder."""
    x = keras.Input([6])
    hidden = layers.Dense(8, activation="tanh", name="hidden")(x)
    kind, size = layers.Dense(3, name="kind"), layers.Dense(1, name="size")
    model = make.wrap(
        keras.Model(x, {"kind": kind(hidden), "size": size(hidden)}, name="two")
    )
    squares = keras.losses.MeanSquaredError(reduction="sum")
    model.compile(
        keras.optimizers.SGD(0.01),
        {"kind": crossentropy(reduction="sum"), "size": squares},
    )
    rows, y = data(30)
    history = model.fit(
        rows,
        {"kind": y, "size": rows[:, :1]},
        sample_weight={"kind": np.linspace(0.1, 1.0, 30).astype(np.float32)},
        batch_size=8,
        epochs=2,
        verbose=0,
    ).history
    return Trained(history, model)


def bfloat(make: Maker) -> Trained:
    """mixed_bfloat16."""
    with _policy("mixed_bfloat16"):
        model = dense_net(make.base)
        model.compile(keras.optimizers.Adam(0.01), crossentropy(), ["accuracy"])
        history = model.fit(*data(32), batch_size=16, epochs=2, verbose=0).history
    return Trained(history, model)


def loss_scaled(make: Maker) -> Trained:
    """mixed_float16 with a loss scale that is too large at first, so that it moves."""
    with _policy("mixed_float16"):
        model = dense_net(make.base)
        optimizer = keras.mixed_precision.LossScaleOptimizer(
            keras.optimizers.SGD(0.05, momentum=0.9),
            initial_scale=2.0**20,
            dynamic_growth_steps=3,
        )
        model.compile(optimizer, crossentropy(), ["accuracy"])
        history = model.fit(*data(48), batch_size=16, epochs=3, verbose=0).history
    figures = {**history, "scale": [float(optimizer.loss_scale)]}
    return Trained({**figures, "steps": [int(optimizer.iterations)]}, model)


class _policy:
    def __init__(self, name: str) -> None:
        self.name = name

    def __enter__(self) -> None:
        keras.mixed_precision.set_global_policy(self.name)

    def __exit__(self, *error: Any) -> None:
        keras.mixed_precision.set_global_policy("float32")


BFLOAT = 2e-2
"""Three significant digits, in sums of other orders."""

SCRIPTS = [
    FitScript("subclassed", subclassed),
    FitScript("functional", functional),
    FitScript("normalized", normalized, truths=("microbatches",)),
    FitScript("weighted", weighted),
    FitScript("generated", generated),
    FitScript("sequence", sequence),
    FitScript("own_losses", own_losses),
    FitScript("words", words),
    FitScript("by_hand", by_hand),
    FitScript("summed", summed, truths=("batches",)),
    FitScript("partly_weighted", partly_weighted, truths=("batches",)),
    FitScript("bfloat", bfloat, BFLOAT),
    FitScript("loss_scaled", loss_scaled, BFLOAT),
]
