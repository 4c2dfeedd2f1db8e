"""What the tests of callbacks share: a model, its data, and what ranks have printed."""

import csv
import pathlib
from typing import Any

import numpy as np
import tensorflow as tf

from tests.ranks import Outcome

keras = tf.keras
FLOATS = 2e-5
CONFIG = {"microbatches": 4, "timeout_s": 40.0}
START = "---- case "  # in a rank's output, before each


def arrays(rows: int = 48) -> tuple[Any, Any]:
    chance = np.random.default_rng(7)
    x = chance.standard_normal((rows, 6)).astype(np.float32)
    return x, (x[:, 0] + 0.5 * chance.standard_normal(rows) > 0).astype(np.int64)


def network(base: type) -> Any:
    keras.backend.clear_session()
    keras.utils.set_random_seed(4)

    class Net(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="net")
            self.words = keras.layers.Embedding(4, 3)
            self.parts = [keras.layers.Dense(8, activation="tanh") for _ in range(3)]
            self.head = keras.layers.Dense(2)

        def call(self, x: Any) -> Any:
            kind = tf.cast(x[:, 1] > 0, tf.int32)
            x = tf.concat([x, self.words(kind)], 1)
            for part in self.parts:
                x = part(x)
            return self.head(x)

    model = Net()
    model.compile(
        keras.optimizers.Adam(0.05),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        ["accuracy"],
    )
    return model


def fit(model: Any, callbacks: Any, epochs: int = 6, **options: Any) -> Any:
    given = {"batch_size": 12, "validation_split": 0.25, "verbose": 0, **options}
    return model.fit(*arrays(), epochs=epochs, callbacks=callbacks, **given)


def weights_of(model: Any) -> list[Any]:
    return [np.array(each) for each in model.get_weights()]


def cases(outcome: Outcome) -> dict[str, str]:
    """Name of a case -> what a rank has printed in it."""
    parts = outcome.output.split(START)[1:]
    return {part.split("\n")[0]: part.partition("\n")[2] for part in parts}


def rows_of(path: pathlib.Path) -> tuple[list[str], Any]:
    """Header and figures of a file that CSVLogger wrote."""
    header, *rows = csv.reader(path.read_text().splitlines())
    return header, np.array(rows, np.float64)
