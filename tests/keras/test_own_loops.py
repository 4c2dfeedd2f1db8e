"""Plain Keras optimizers in a loop of one's own: the numbers of one process."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.keras.update_cases import GROWING, decay, legacy, new, scaled
from tests.ranks import ranks

keras = tf.keras
OPTIMIZERS = {
    "scaled": scaled(lambda: new.Adam(0.01), **GROWING),
    "scaled, global": scaled(lambda: new.SGD(0.1, global_clipnorm=0.3), **GROWING),
    "legacy scaled": scaled(lambda: legacy.SGD(decay(), momentum=0.9), **GROWING),
    "global": lambda: new.SGD(0.1, momentum=0.9, global_clipnorm=0.3),
    "legacy global": lambda: legacy.Adam(0.01, global_clipnorm=0.3),
}
STEPS, SPOILED = 6, 2


def net(base: type, trained: int = 4) -> Any:
    """Four layers, of which the last ones are trained."""

    class Net(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="net")
            self.stack = [
                keras.layers.Dense(4, "tanh", name=f"part_{i}") for i in range(4)
            ]
            for layer in self.stack[: 4 - trained]:
                layer.trainable = False

        def call(self, x: tf.Tensor) -> tf.Tensor:
            for layer in self.stack:
                x = layer(x)
            return x

    keras.utils.set_random_seed(1)
    return Net()


def forward(model: Any, optimizer: Any, x: tf.Tensor) -> Any:
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean((model(x) - 1.0) ** 2)
        if hasattr(optimizer, "get_scaled_loss"):
            loss = optimizer.get_scaled_loss(loss)
    return tape.gradient(loss, model.trainable_variables)


def apply(optimizer: Any, gradients: Any, variables: Any, is_spoiled: Any) -> None:
    """What a script does; the gradients of the last layer overflow in one step."""
    if hasattr(optimizer, "get_scaled_loss"):
        gradients = optimizer.get_unscaled_gradients(gradients)
        bad = tf.where(is_spoiled, np.inf, 0.0)
        gradients = [
            gradient + bad if "part_3" in variable.name else gradient
            for gradient, variable in zip(gradients, variables)
        ]
    optimizer.apply_gradients(zip(gradients, variables))


def compare(name: str, trained: int = 4) -> None:
    make = OPTIMIZERS[name]
    x = tf.constant(np.random.default_rng(0).normal(size=[8, 4]).astype("float32"))
    plain, plain_optimizer = net(keras.Model, trained), make()
    plain(x)
    model, optimizer = net(smp.DistributedModel, trained), make()
    step = smp.step(lambda x: forward(model, optimizer, x))

    @tf.function
    def train(x: tf.Tensor, is_spoiled: tf.Tensor) -> None:
        means = [gradient.accumulate() for gradient in step(x)]
        apply(optimizer, means, model.trainable_variables, is_spoiled)

    @tf.function
    def train_plainly(x: tf.Tensor, is_spoiled: tf.Tensor) -> None:
        gradients = forward(plain, plain_optimizer, x)
        apply(plain_optimizer, gradients, plain.trainable_variables, is_spoiled)

    for number in range(STEPS):
        is_spoiled = tf.constant(number == SPOILED)
        train(x, is_spoiled)
        train_plainly(x, is_spoiled)
        about = f"{name} trained={trained} step={number}"
        if hasattr(optimizer, "loss_scale"):
            scales = float(optimizer.loss_scale), float(plain_optimizer.loss_scale)
            assert scales[0] == scales[1], (about, scales)
        assert int(optimizer.iterations) == number + 1, about
    names = [variable.name for variable in plain.trainable_variables]
    for variable in model.trainable_variables:
        whole = plain.trainable_variables[names.index(variable.name)]
        np.testing.assert_allclose(variable, whole, 1e-5, 1e-6, err_msg=about)
    assert sum(smp.allgather(len(model.trainable_variables), smp.WORLD)) == len(names)


@ranks(2, timeout=110)
def test_the_whole_model_is_checked_and_clipped() -> None:
    smp.init({"microbatches": 2, "timeout_s": 30})
    for name in OPTIMIZERS:
        compare(name)


@ranks(2, timeout=110)
def test_a_rank_with_nothing_to_train_takes_part() -> None:
    smp.init({"microbatches": 2, "timeout_s": 30})
    for name in OPTIMIZERS:
        compare(name, trained=1)


@ranks(2)
def test_a_model_of_one_rank_is_its_own_business() -> None:
    smp.init({"timeout_s": 10})
    if smp.rank() == 0:
        variable = tf.Variable([4.0])
        optimizer = scaled(lambda: new.SGD(1.0, global_clipnorm=1.0), **GROWING)()
        optimizer.get_scaled_loss(tf.constant(1.0))
        (gradient,) = optimizer.get_unscaled_gradients([tf.constant([16.0])])
        optimizer.apply_gradients([(gradient, variable)])
        np.testing.assert_array_equal(variable, [3.0])
    smp.barrier()


@ranks(2)
def test_other_optimizers_on_other_ranks_are_told() -> None:
    smp.init({"microbatches": 2, "timeout_s": 30})
    optimizer = new.SGD(0.1, global_clipnorm=1.0 + smp.rank())
    model = net(smp.DistributedModel)
    step = smp.step(lambda x: forward(model, optimizer, x))
    means = [gradient.accumulate() for gradient in step(tf.ones([4, 4]))]
    with pytest.raises(smp.SmpError, match="rank 0: SGD.*=1.0.*rank 1: SGD.*=2.0"):
        optimizer.apply_gradients(zip(means, model.trainable_variables))
