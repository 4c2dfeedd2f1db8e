"""A rank fails in the middle of training: the pipeline ends everywhere, by name."""

import os
import signal

import pytest
import tensorflow as tf

import smp_tf as smp
from tests.ranks import start_ranks

CULPRIT = 1
LIMIT_SECONDS = 10.0  # for every other rank to end after the culprit failed


def _train(how: str) -> None:
    """Train until rank 1 fails after some steps, with microbatches under way."""
    smp.init({"microbatches": 4})
    tf.keras.utils.set_random_seed(1)

    class Net(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__(name="net")
            self.stack = [tf.keras.layers.Dense(64) for _ in range(6)]

        def call(self, x: tf.Tensor) -> tf.Tensor:
            for layer in self.stack:
                x = layer(x)
            return x

    model, optimizer = Net(), tf.keras.optimizers.Adam()

    @smp.step
    def forward_backward(x: tf.Tensor) -> tuple[list[tf.Tensor], tf.Tensor]:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(x: tf.Tensor) -> tf.Tensor:
        gradients, loss = forward_backward(x)
        gradients = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss.reduce_mean()

    for step in range(100_000):
        if step == 20 and smp.rank() == CULPRIT:
            if how == "raise":
                raise ValueError("boom")
            os.kill(os.getpid(), signal.SIGKILL)
        train_step(tf.ones([64, 64]))


@pytest.mark.parametrize(
    ("how", "text"),
    [("raise", "rank 1 failed: ValueError: boom"), ("kill", "rank 1 died")],
)
def test_training_ends_on_every_rank(how: str, text: str) -> None:
    outcomes = start_ranks(3, _train, how, timeout=90)
    shown = "\n".join(map(str, outcomes))
    culprit = outcomes[CULPRIT]
    assert culprit.exit_code != 0, shown
    for outcome in outcomes:
        if outcome.rank == CULPRIT:
            continue
        assert not outcome.timed_out and outcome.exit_code == 1, shown
        assert text in (outcome.error or ""), shown
        assert "stage" in outcome.error and "microbatch" in outcome.error, shown
        assert outcome.ended - culprit.ended < LIMIT_SECONDS, shown
