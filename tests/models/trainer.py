"""What the scripts that call their own steps have in common: data, step and update."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from tests.models.script import Job, classes, cross_entropy, stack, tokens, vectors

Features = Callable[[np.random.RandomState, int], Any]


def batches(
    sizes: Sequence[int] = (8, 8, 8), features: Features = vectors()
) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """(x, y) for each size."""
    random = np.random.RandomState(0)
    return [
        (tf.constant(features(random, size)), tf.constant(classes()(random, size)))
        for size in sizes
    ]


def sentences(*shapes: tuple[int, int]) -> list[tuple[tf.Tensor, tf.Tensor]]:
    """(tokens, y) for each (batch, length)."""
    return [
        pair
        for number, length in shapes
        for pair in batches([number], features=tokens(length))
    ]


def dataset(count: int = 3) -> tf.data.Dataset:
    """The batches as a dataset of single examples, batched again."""
    x, y = (tf.concat(part, 0) for part in zip(*batches([8] * count)))
    examples = tf.data.Dataset.from_tensor_slices((x, y))
    return examples.batch(8, drop_remainder=True)


class Trainer:
    """A model, its step and its optimizer, as a user's script has them."""

    def __init__(
        self,
        base: type,
        step: Callable[..., Any],
        model: Any = None,
        optimizer: Any = None,
        **options: Any,
    ) -> None:
        """
        Args:
            **options: of the step's decorator.
        """
        model = model or stack(base)
        self.model = model
        self.optimizer = optimizer or tf.keras.optimizers.SGD(0.1, momentum=0.9)
        self.traces = traces = []  # a shape for each run of the step's Python code

        @step(**options)
        def forward_backward(x: Any, y: Any) -> Any:
            traces.append(x.shape)
            with tf.GradientTape() as tape:
                loss = cross_entropy(y, model(x, training=True))
            return tape.gradient(loss, model.trainable_variables), loss

        @step(**options)
        def evaluate(x: Any, y: Any) -> Any:
            outputs = model(x, training=False)
            return cross_entropy(y, outputs), outputs

        self.step, self.evaluate = forward_backward, evaluate

    def apply(self, gradients: Sequence[Any]) -> None:
        means = [None if g is None else g.accumulate() for g in gradients]
        pairs = zip(means, self.model.trainable_variables, strict=True)
        self.optimizer.apply_gradients(pairs)

    def update(self, x: Any, y: Any) -> tf.Tensor:
        """One training step: the loss."""
        gradients, loss = self.step(x, y)
        self.apply(gradients)
        return loss.reduce_mean()

    def job(self, main: Callable[[], Any]) -> Job:
        """A script that trains with the batches above."""
        return Job(main, [self.model], lambda: self.step.plan(*batches()[0]))
