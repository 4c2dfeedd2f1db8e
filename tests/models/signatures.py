"""Steps called with several signatures, or with one that leaves sizes open.

The scripts also return how often the step was traced after its first call. The truth of
that is ``tf.function``, which traces again for the same calls.
"""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tests.models.reuse import Block
from tests.models.script import Job, JobCase, cross_entropy, layers, stack
from tests.models.trainer import Trainer, batches, sentences

_Decorator = Callable[..., Any]
_TOKENS = [tf.TensorSpec([None, None], tf.int64), tf.TensorSpec([None], tf.int64)]


def _reader(base: type) -> Any:
    """Tokens of any number and length: attention, an LSTM, a mean."""

    class Reader(base):
        def __init__(self) -> None:
            super().__init__(name="reader")
            self.embed = layers.Embedding(20, 8)
            self.block = Block(8, "block")
            self.lstm = layers.LSTM(8, return_sequences=True)
            self.head = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = self.lstm(self.block(self.embed(x)))
            return self.head(tf.reduce_mean(x, 1))

    return Reader()


def _trained(trainer: Trainer, data: Any) -> Any:
    """Losses of eager updates, and the traces that the later ones needed."""
    losses = [trainer.update(*data[0])]
    first = len(trainer.traces)
    losses += [trainer.update(x, y) for x, y in data[1:]]
    return losses, len(trainer.traces) - first


def batch_sizes(base: type, step: _Decorator) -> Job:
    """Batches of three sizes, each seen twice: three signatures, one partition."""
    trainer = Trainer(base, step)
    data = batches((8, 16, 8, 24, 16, 24))
    return trainer.job(lambda: _trained(trainer, data))


def sequence_lengths(base: type, step: _Decorator) -> Job:
    """Sentences of two shapes: in an outer tf.function, which is traced for each, then
    eagerly, which needs no other trace."""
    trainer = Trainer(base, step, _reader(base))
    update = tf.function(trainer.update)
    data = sentences((8, 5), (16, 3), (8, 5))

    def main() -> Any:
        return [update(x, y) for x, y in data], _trained(trainer, data)

    return Job(main, [trainer.model], lambda: trainer.step.plan(*data[0]))


def open_signature(base: type, step: _Decorator) -> Job:
    """``input_signature`` with unknown batch and length: one trace for all of them."""
    trainer = Trainer(base, step, _reader(base), input_signature=_TOKENS)
    data = sentences((8, 5), (16, 3), (8, 7), (24, 5), (8, 1))

    def main() -> Any:
        trained = _trained(trainer, data)
        assert trained[1] == 0, f"traced again: {trainer.traces}"
        return trained, [trainer.evaluate(x, y) for x, y in data]

    return Job(main, [trainer.model], lambda: trainer.step.plan(*data[0]))


def open_signature_in_a_loop(base: type, step: _Decorator) -> Job:
    """The same in a loop over a dataset whose batches have no static shape."""
    trainer = Trainer(base, step, _reader(base), input_signature=_TOKENS)
    data = sentences((8, 5), (16, 3), (8, 7))
    shapes = (tf.TensorSpec([None, None], tf.int64), tf.TensorSpec([None], tf.int64))

    @tf.function
    def epoch(batched: tf.data.Dataset) -> tf.Tensor:
        total = tf.constant(0.0)
        for x, y in batched:
            total += trainer.update(x, y)
        return total

    def main() -> Any:
        return epoch(
            tf.data.Dataset.from_generator(lambda: data, output_signature=shapes)
        )

    return Job(main, [trainer.model], lambda: trainer.step.plan(*data[0]))


def python_arguments(base: type, step: _Decorator) -> Job:
    """Python numbers, strings, bools and None: constants, a trace for each value."""
    model, traces = stack(base), []

    @step
    def predict(x: Any, scale: float, mode: str | None, is_training: bool) -> Any:
        traces.append(scale)
        outputs = model(x * scale, training=is_training)
        return tf.nn.softmax(outputs) if mode == "probabilities" else outputs

    (x, _), *_ = batches()
    calls = [
        (1.0, None, False),
        (0.5, None, False),
        (0.5, "probabilities", False),
        (1.0, None, False),
        (0.5, "probabilities", True),
        (0.5, None, False),
    ]

    def main() -> Any:
        found = [predict(x, *calls[0])]
        first = len(traces)
        found += [predict(x, *call) for call in calls[1:]]
        return found, len(traces) - first

    return Job(main, [model], lambda: predict.plan(x, *calls[0]))


def other_axes(base: type, step: _Decorator) -> Job:
    """Time-major inputs, split along axis 1; weights that all microbatches get."""
    model = _reader(base)

    @step(input_split_axes={"x": 1}, non_split_inputs=["weights"])
    def forward_backward(x: Any, y: Any, weights: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = model(tf.transpose(x), training=True) * weights
            loss = cross_entropy(y, logits)
        return tape.gradient(loss, model.trainable_variables), loss, logits

    weights = tf.linspace(0.5, 1.5, 6)
    data = [
        (tf.transpose(x), y, tf.cast(weights, tf.float32))
        for x, y in sentences((8, 5), (8, 5))
    ]

    def main() -> Any:
        found = []
        for each in data:
            gradients, loss, logits = forward_backward(*each)
            for gradient, variable in zip(
                gradients, model.trainable_variables, strict=True
            ):
                variable.assign_sub(tf.convert_to_tensor(gradient.accumulate()))
            found.append((loss, logits))
        return found

    return Job(main, [model], lambda: forward_backward.plan(*data[0]))


CASES = [
    JobCase("batch_sizes", "eagerly", batch_sizes),
    JobCase("sequence_lengths", "both", sequence_lengths),
    JobCase("open_signature", "eagerly", open_signature),
    JobCase("open_signature_in_a_loop", "graph loop", open_signature_in_a_loop),
    JobCase("python_arguments", "eagerly", python_arguments),
    JobCase("other_axes", "eagerly", other_axes),
]
