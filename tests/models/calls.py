"""Ways of calling a step: eagerly, in functions, in loops, in turns."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tests.models.script import Job, JobCase, cross_entropy, stack
from tests.models.trainer import Trainer, batches, dataset

_Decorator = Callable[..., Any]


def eager(base: type, step: _Decorator) -> Job:
    """Everything eagerly: the step, the sums, the optimizer."""
    trainer = Trainer(base, step)
    return trainer.job(lambda: [trainer.update(x, y) for x, y in batches()])


def outer_function(base: type, step: _Decorator) -> Job:
    """The usual script: a tf.function around a step and the optimizer."""
    trainer = Trainer(base, step)
    update = tf.function(trainer.update)
    return trainer.job(lambda: [update(x, y) for x, y in batches()])


def nested_functions(base: type, step: _Decorator) -> Job:
    """A tf.function in a tf.function, and the same step from both and eagerly."""
    trainer = Trainer(base, step)
    inner = tf.function(trainer.update)

    @tf.function
    def outer(x: tf.Tensor, y: tf.Tensor) -> Any:
        return inner(x, y) + trainer.update(x, y)

    def main() -> Any:
        (x, y), *more = batches()
        first = trainer.update(x, y)
        return first, [outer(x, y) for x, y in more], inner(x, y)

    return trainer.job(main)


def graph_loop(base: type, step: _Decorator) -> Job:
    """``for batch in dataset`` in a tf.function."""
    trainer = Trainer(base, step)

    @tf.function
    def epoch(data: tf.data.Dataset) -> tf.Tensor:
        total = tf.constant(0.0)
        for x, y in data:
            total += trainer.update(x, y)
        return total

    return trainer.job(lambda: [epoch(dataset()) for _ in range(2)])


def steps_per_execution(base: type, step: _Decorator) -> Job:
    """As Keras does it: a loop in a graph that takes batches from an iterator."""
    trainer = Trainer(base, step)

    @tf.function
    def execute(iterator: Any, count: tf.Tensor) -> tf.Tensor:
        loss = tf.constant(0.0)
        for _ in tf.range(count):
            x, y = next(iterator)
            loss = trainer.update(x, y)
        return loss

    def main() -> Any:
        iterator = iter(dataset(5))
        return [execute(iterator, tf.constant(n)) for n in (2, 2, 1)]

    return trainer.job(main)


def unrolled(base: type, step: _Decorator) -> Job:
    """The same step several times in one function: with the same weights, whose
    gradients are added up, and again with those updated in between."""
    trainer = Trainer(base, step)

    @tf.function
    def update(x: tf.Tensor, y: tf.Tensor) -> Any:
        first, loss = trainer.step(x, y)
        second, other = trainer.step(-x, y)
        pairs = zip(first, second, trainer.model.trainable_variables, strict=True)
        trainer.optimizer.apply_gradients(
            [(a.accumulate() + b.accumulate(), v) for a, b, v in pairs]
        )
        return loss.merge(), other.merge(), trainer.update(x, y)

    return trainer.job(lambda: [update(x, y) for x, y in batches()])


def alternating(base: type, step: _Decorator) -> Job:
    """Training and evaluation in turns, eagerly and in one function."""
    trainer = Trainer(base, step)

    def both(x: tf.Tensor, y: tf.Tensor) -> Any:
        loss, outputs = trainer.evaluate(x, y)
        trained = trainer.update(x, y)
        return loss.reduce_mean(), outputs.merge(), trained, trainer.evaluate(x, y)[0]

    def main() -> Any:
        function = tf.function(lambda x, y: both(x, y)[:3])
        return [(both(x, y), function(x, y)) for x, y in batches()]

    return trainer.job(main)


def choosing_in_a_loop(base: type, step: _Decorator) -> Job:
    """A loop in a graph trains with every other batch and evaluates the rest: the steps
    are in the branches of a condition."""
    trainer = Trainer(base, step)

    @tf.function
    def epoch(data: tf.data.Dataset) -> Any:
        trained, seen = tf.constant(0.0), tf.constant(0.0)
        for i, (x, y) in data.enumerate():
            if i % 2 == 0:
                trained += trainer.update(x, y)
            else:
                seen += trainer.evaluate(x, y)[0].reduce_mean()
        return trained, seen

    return trainer.job(lambda: epoch(dataset(4)))


def metrics_by_epoch(base: type, step: _Decorator) -> Job:
    """Metrics that the steps update, read and reset between the epochs."""
    model, optimizer = stack(base), tf.keras.optimizers.Adam(0.01)
    mean = tf.keras.metrics.Mean()
    accuracy = tf.keras.metrics.SparseCategoricalAccuracy()

    @step
    def train(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = cross_entropy(y, model(x, training=True))
        mean.update_state(loss)
        return tape.gradient(loss, model.trainable_variables)

    @step
    def evaluate(x: Any, y: Any) -> Any:
        outputs = model(x, training=False)
        accuracy.update_state(y, outputs)
        return outputs

    @tf.function
    def epoch(data: tf.data.Dataset) -> None:
        for x, y in data:
            pairs = zip(train(x, y), model.trainable_variables, strict=True)
            optimizer.apply_gradients([(g.accumulate(), v) for g, v in pairs])

    def main() -> Any:
        history = []
        for _ in range(2):
            mean.reset_state()
            accuracy.reset_state()
            epoch(dataset())
            outputs = [evaluate(x, y) for x, y in batches()]
            history.append((outputs, mean.result(), accuracy.result()))
        return history

    state = [*mean.variables, *accuracy.variables]
    return Job(main, [model], lambda: train.plan(*batches()[0]), state)


def evaluation_only(base: type, step: _Decorator) -> Job:
    """A script without any gradient or state: nothing but the order of the calls keeps
    them apart, in a line and in a loop."""
    trainer = Trainer(base, step)

    @tf.function
    def evaluate(x: tf.Tensor, y: tf.Tensor) -> Any:
        loss, outputs = trainer.evaluate(x, y)
        other, reversed_outputs = trainer.evaluate(tf.reverse(x, [0]), y)
        return loss.merge(), outputs.merge(), other.merge(), reversed_outputs.stack()

    @tf.function
    def epoch(data: tf.data.Dataset) -> tf.Tensor:
        losses = tf.TensorArray(tf.float32, 4)
        for i, (x, y) in data.enumerate():
            loss = trainer.evaluate(x, y)[0].reduce_mean()
            losses = losses.write(tf.cast(i, tf.int32), loss)
        return losses.stack()

    def main() -> Any:
        eagerly = [trainer.evaluate(x, y) for x, y in batches()]
        return eagerly, [evaluate(x, y) for x, y in batches()], epoch(dataset(4))

    return Job(main, [trainer.model], lambda: trainer.evaluate.plan(*batches()[0]))


CASES = [
    JobCase("eager", "eagerly", eager),
    JobCase("outer_function", "tf.function", outer_function),
    JobCase("nested_functions", "tf.functions", nested_functions),
    JobCase("graph_loop", "graph loop", graph_loop),
    JobCase("steps_per_execution", "iterator loop", steps_per_execution),
    JobCase("unrolled", "several times", unrolled),
    JobCase("alternating", "two steps", alternating),
    JobCase("choosing_in_a_loop", "steps in tf.cond", choosing_in_a_loop),
    JobCase("metrics_by_epoch", "graph loop", metrics_by_epoch),
    JobCase("evaluation_only", "no gradient", evaluation_only),
]
