"""``run_eagerly=True``: microbatch by microbatch in Python, the same numbers."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.keras.scripts import FLOATS, crossentropy, data, dense_net

ROWS, BATCH, MICROBATCHES = 26, 8, 4


@pytest.fixture(autouse=True)
def session() -> Any:
    smp.init({"microbatches": MICROBATCHES})
    yield
    smp.shutdown()


def train(**options: Any) -> tuple[Any, list[Any]]:
    tf.keras.utils.set_random_seed(3)
    seen: list[Any] = []

    model = dense_net(smp.DistributedModel)
    call = type(model).call

    def watched_call(self: Any, x: Any) -> Any:
        seen.append(x)
        return call(self, x)

    type(model).call = watched_call
    model.compile(tf.keras.optimizers.Adam(0.01), crossentropy(), ["accuracy"])
    model.run_eagerly = options.get("run_eagerly", False)
    x, y = data(ROWS)
    figures = model.fit(x, y, batch_size=BATCH, epochs=2, verbose=0).history
    figures["evaluate"] = model.evaluate(x, y, batch_size=BATCH, verbose=0)
    figures["predict"] = model.predict(x, batch_size=BATCH, verbose=0)
    figures["weights"] = [variable.numpy() for variable in model.variables]
    return figures, seen


def test_microbatches_run_as_python_code() -> None:
    figures, seen = train(run_eagerly=True)
    assert all(tf.executing_eagerly() and hasattr(x, "numpy") for x in seen)
    # 3 batches of 4 microbatches and one of 2, in 2 epochs, evaluate and predict.
    assert [int(x.shape[0]) for x in seen] == ([2] * 12 + [1] * 2) * 4
    expected, traced = train()
    assert not any(hasattr(x, "numpy") for x in traced)
    for name, value in expected.items():
        for one, other in zip(tf.nest.flatten(figures[name]), tf.nest.flatten(value)):
            np.testing.assert_allclose(one, other, rtol=FLOATS, atol=FLOATS)


def test_an_error_shows_the_line_of_the_layer() -> None:
    class Broken(smp.DistributedModel):
        def call(self, x: Any) -> Any:
            raise ZeroDivisionError("in call")

    model = Broken()
    model.compile("sgd", "mse", run_eagerly=True)
    with pytest.raises(ZeroDivisionError, match="in call"):
        model.fit(*data(8), verbose=0)
    # Afterwards it is a distributed model again.
    with pytest.raises(smp.SmpError, match="inside a function decorated"):
        model(data(8)[0])
