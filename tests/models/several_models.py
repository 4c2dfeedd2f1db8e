"""Several DistributedModels in one script, each with its own step or optimizer."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf

from tests.models.script import Job, JobCase, cross_entropy, stack
from tests.models.trainer import Trainer, batches, dataset

_Decorator = Callable[..., Any]


def _apply(optimizer: Any, gradients: Any, model: Any) -> None:
    pairs = zip(gradients, model.trainable_variables, strict=True)
    optimizer.apply_gradients([(g.accumulate(), v) for g, v in pairs])


def gan(base: type, step: _Decorator) -> Job:
    """The judge's step and the maker's in turns, both over both models, with an
    optimizer each."""
    maker, judge = stack(base, "maker", 8), stack(base, "judge", 1)
    maker_adam, judge_adam = (tf.keras.optimizers.Adam(0.01) for _ in range(2))

    def loss_of(logits: tf.Tensor, is_real: bool) -> tf.Tensor:
        labels = tf.fill(tf.shape(logits), float(is_real))
        each = tf.nn.sigmoid_cross_entropy_with_logits(labels, logits)
        return tf.reduce_mean(each)

    @step
    def judge_step(real: Any, noise: Any) -> Any:
        with tf.GradientTape() as tape:
            fake = maker(noise, training=True)
            loss = loss_of(judge(real, training=True), True)
            loss += loss_of(judge(fake, training=True), False)
        return tape.gradient(loss, judge.trainable_variables), loss

    @step
    def maker_step(noise: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(judge(maker(noise, training=True), training=True), True)
        return tape.gradient(loss, maker.trainable_variables), loss

    @tf.function
    def epoch(data: tf.data.Dataset) -> Any:
        judged, made = tf.constant(0.0), tf.constant(0.0)
        for x, _ in data:
            gradients, loss = judge_step(x, -x)
            _apply(judge_adam, gradients, judge)
            judged += loss.reduce_mean()
            gradients, loss = maker_step(-x)
            _apply(maker_adam, gradients, maker)
            made += loss.reduce_mean()
        return judged, made

    def main() -> Any:
        return [epoch(dataset()) for _ in range(2)]

    x = batches()[0][0]
    return Job(main, [maker, judge], lambda: judge_step.plan(x, -x))


def teacher(base: type, step: _Decorator) -> Job:
    """A teacher is trained by its own step, frozen, and then part of the student's."""
    lessons, student = Trainer(base, step, stack(base, "teacher")), stack(base, "pupil")
    optimizer = tf.keras.optimizers.Adam(0.01)

    @step
    def learn(x: Any, y: Any) -> Any:
        target = tf.nn.softmax(lessons.model(x, training=False))
        with tf.GradientTape() as tape:
            logits = student(x, training=True)
            soft = tf.nn.softmax_cross_entropy_with_logits(target, logits)
            loss = cross_entropy(y, logits) + tf.reduce_mean(soft)
        return tape.gradient(loss, student.trainable_variables), loss

    @tf.function
    def update(x: Any, y: Any) -> tf.Tensor:
        gradients, loss = learn(x, y)
        _apply(optimizer, gradients, student)
        return loss.reduce_mean()

    def main() -> Any:
        taught = [lessons.update(x, y) for x, y in batches()]
        lessons.model.trainable = False
        return taught, [update(x, y) for x, y in batches()]

    return Job(main, [lessons.model, student], lambda: learn.plan(*batches()[0]))


def independent(base: type, step: _Decorator) -> Job:
    """Two models that know nothing of each other, trained in turns in one function."""
    one = Trainer(base, step, stack(base, "one"))
    other = Trainer(base, step, stack(base, "other"), tf.keras.optimizers.Adam(0.01))

    @tf.function
    def update(x: Any, y: Any) -> Any:
        return one.update(x, y), other.update(-x, y), one.update(-x, y)

    def main() -> Any:
        return [update(x, y) for x, y in batches()]

    return Job(main, [one.model, other.model], lambda: other.step.plan(*batches()[0]))


CASES = [
    JobCase("gan", "graph loop", gan),
    JobCase("teacher", "both", teacher),
    JobCase("independent", "tf.function", independent),
]
