"""Optimizers on partitions: the numbers of plain Keras on the whole list.

See ``update_cases``.
"""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.keras.updates import apply_gradients
from tests.keras.update_cases import (
    BY_GLOBAL_NORM,
    CLOSE,
    DENSE,
    EXACT,
    GROWING,
    SAME,
    SCALED,
    SHAPES,
    SOME,
    Make,
    Run,
    check,
    compare,
    new,
    plain,
    scaled,
    spoiled,
    unscaled,
)
from tests.ranks import ranks, run_ranks

# What rank 0 owns, what rank 1 owns.
SPLIT = ((0, 1, 4), (2, 3))
IDLE = ((0, 1, 2, 3, 4), ())
ONLY_NONE = ((4,), (0, 1, 2, 3))
ONLY_SPARSE = ((2,), (0, 1, 3, 4))


def check_layout(
    cases: Mapping[str, Make],
    layout: Any,
    close: Mapping[str, float],
    dense: bool = False,
) -> list[str]:
    return check(apply_gradients, cases, layout[smp.rank()], close, dense)


def start() -> None:
    # Else a graph of some variables may be simplified otherwise than one of all.
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    size = int(os.environ.get("HOROVOD_SIZE", 1))
    smp.init({"partitions": size, "microbatches": 2})


@ranks(2, timeout=110)
def test_every_optimizer_updates_its_part_as_keras_does() -> None:
    start()
    wrong = check_layout(EXACT, SPLIT, SAME)
    wrong += check_layout(DENSE, SPLIT, SAME, dense=True)
    wrong += check_layout(BY_GLOBAL_NORM, SPLIT, CLOSE)
    assert not wrong, "\n".join(wrong)


@ranks(2, timeout=110)
def test_ranks_with_nothing_to_train_keep_count() -> None:
    start()
    some = {name: EXACT[name] for name in SOME}
    wrong = []
    for layout in (IDLE, ONLY_NONE, ONLY_SPARSE):
        wrong += check_layout(some, layout, SAME)
        wrong += check_layout(BY_GLOBAL_NORM, layout, CLOSE)
    assert not wrong, "\n".join(wrong)


@ranks(2, timeout=110)
def test_the_loss_scale_moves_in_step_on_every_rank() -> None:
    start()
    for layout in (SPLIT, IDLE, ONLY_NONE, ONLY_SPARSE):
        for name, (make, close) in SCALED.items():
            mine = Run(make, layout[smp.rank()], apply_gradients)
            whole = Run(make, range(len(SHAPES)), unscaled)
            for run in (mine, whole):
                run.optimizer.get_scaled_loss(tf.constant(1.0))  # else Keras warns

            @tf.function
            def both(gradients: Any) -> None:
                mine.step(gradients)
                whole.step(gradients)

            scales = []
            for step in range(8):
                scale = float(whole.optimizer.loss_scale)
                both((plain if "fixed" in name else spoiled)(step, scale))
                found = [
                    (float(each.loss_scale), each.dynamic and int(each.dynamic_counter))
                    for each in (mine.optimizer, whole.optimizer)
                ]
                assert found[0] == found[1], (layout, name, step, found)
                compare(f"{layout} {name} {step}", mine, whole, close)
                scales.append(found[0][0])
            if whole.optimizer.dynamic:
                assert scales == [8.0, 16.0, 16.0, 8.0, 4.0, 4.0, 8.0, 8.0], scales


@ranks(2)
def test_a_rank_with_no_place_for_a_nan_still_skips() -> None:
    start()
    optimizer = scaled(lambda: new.SGD(0.1), **GROWING)()
    variable = tf.Variable(tf.ones([3, 2]))
    none = tf.IndexedSlices(tf.zeros([0, 2]), tf.zeros([0], tf.int64), [3, 2])
    gradient = none if smp.rank() == 0 else tf.fill([3, 2], np.inf)
    apply_gradients(optimizer, [gradient], [variable])
    assert float(optimizer.loss_scale) == 4.0
    assert int(optimizer.dynamic_counter) == 0 and int(optimizer.iterations) == 1
    np.testing.assert_array_equal(variable, np.ones([3, 2]))

    # Squares beyond float32: Keras would write NaN; here all ranks skip alike.
    optimizer = scaled(lambda: new.SGD(0.1, global_clipnorm=1.0), **GROWING)()
    mine = smp.rank() == 1
    apply_gradients(optimizer, [tf.fill([3, 2], 1e30)] * mine, [variable] * mine)
    assert float(optimizer.loss_scale) == 4.0 and int(optimizer.iterations) == 1
    np.testing.assert_array_equal(variable, np.ones([3, 2]))


@ranks(2)
def test_ranks_that_disagree_are_told() -> None:
    start()
    variable, gradient = tf.Variable([1.0]), tf.constant([1.0])
    mine = new.SGD(0.1, global_clipnorm=1.0 + smp.rank())
    with pytest.raises(smp.SmpError, match="rank 0: SGD.*=1.0.*rank 1: SGD.*=2.0"):
        apply_gradients(mine, [gradient], [variable])
    with pytest.raises(smp.TraceError, match="no variable of the model has a gradient"):
        apply_gradients(new.SGD(0.1), [None], [variable])
    optimizer = new.SGD(1.0, global_clipnorm=1.0)
    apply_gradients(optimizer, [gradient], [variable])  # eagerly
    np.testing.assert_allclose(variable, [1.0 - 0.5**0.5], rtol=1e-6)
    assert optimizer.global_clipnorm == 1.0


def _wrapped_by_horovod() -> None:
    start()
    for key in ("RANK", "LOCAL_RANK"):  # a world of its own for each rank
        os.environ[f"HOROVOD_{key}"] = "0"
    for key in ("SIZE", "LOCAL_SIZE"):
        os.environ[f"HOROVOD_{key}"] = "1"
    import horovod.tensorflow.keras as hvd

    hvd.init()
    assert hvd.size() == 1
    cases = ("momentum", "Adam", "legacy SGD", "legacy Nadam")
    whole = {name: EXACT[name] for name in cases}
    wrapped = {
        name: lambda make=make: hvd.DistributedOptimizer(make())
        for name, make in whole.items()
    }
    for layout in (SPLIT, IDLE)[: smp.size()]:
        wrong = check_layout(wrapped, layout if smp.size() > 1 else (range(5),), SAME)
        assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("size", [1, 2])
def test_optimizers_that_horovod_wraps(size: int) -> None:
    run_ranks(size, _wrapped_by_horovod, timeout=90)


class Net:
    """Two Dense layers and an embedding, on either base class."""

    @staticmethod
    def of(base: type) -> Any:
        class Made(base):  # type: ignore
            def __init__(self) -> None:
                super().__init__(name="net")
                self.embedding = tf.keras.layers.Embedding(7, 4)
                self.stack = [tf.keras.layers.Dense(4, "tanh") for _ in range(2)]

            def call(self, x: tf.Tensor) -> tf.Tensor:
                x = tf.reduce_mean(self.embedding(x), 1)
                for layer in self.stack:
                    x = layer(x)
                return x

        tf.keras.utils.set_random_seed(1)
        return Made()


@ranks(2, timeout=110)
def test_training_with_a_step() -> None:
    start()
    x = tf.constant(np.random.default_rng(0).integers(0, 7, [8, 3]))

    for name in ("global", "legacy global", "fixed"):
        make, _ = SCALED[name]
        plain, plain_optimizer = Net.of(tf.keras.Model), make()
        plain(x)
        model, optimizer = Net.of(smp.DistributedModel), make()

        def forward(net: Any, opt: Any, batch: tf.Tensor) -> Any:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(net(batch) ** 2)
                scaled_loss = opt.get_scaled_loss(loss)
            return tape.gradient(scaled_loss, net.trainable_variables), loss

        step = smp.step(lambda batch: forward(model, optimizer, batch))

        @tf.function
        def train(batch: tf.Tensor, times: int) -> tf.Tensor:
            loss = 0.0
            for _ in tf.range(times):  # the whole of it in a loop
                gradients, losses = step(batch)
                means = [gradient.accumulate() for gradient in gradients]
                apply_gradients(optimizer, means, model.trainable_variables)
                loss = losses.reduce_mean()
            return loss

        @tf.function
        def train_plainly(batch: tf.Tensor) -> tf.Tensor:
            gradients, loss = forward(plain, plain_optimizer, batch)
            unscaled(plain_optimizer, gradients, plain.trainable_variables)
            return loss

        for _ in range(6):
            expected = train_plainly(x)
        found = train(x, 2), train(x, 4)
        np.testing.assert_allclose(found[1], expected, rtol=1e-5)
        assert len(model.trainable_variables) < len(plain.trainable_variables)
        names = [variable.name for variable in model.global_trainable_variables]
        for variable in model.trainable_variables:
            whole = plain.trainable_variables[names.index(variable.name)]
            np.testing.assert_allclose(variable, whole, rtol=1e-5, atol=1e-6)
        assert float(optimizer.loss_scale) == float(plain_optimizer.loss_scale)
        assert int(optimizer.iterations) == 6
