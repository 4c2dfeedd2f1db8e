"""Ways of taking gradients, several models in one step."""

from typing import Any

import tensorflow as tf

from tests.models.script import (
    Script,
    ScriptCase,
    classes,
    cross_entropy,
    stack,
    trainable,
    vectors,
)


def persistent(base: type) -> Script:
    """Two losses from one persistent tape; gradients of an input; several lists."""
    model = stack(base)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(x)
            outputs = model(x, training=True)
            loss = cross_entropy(y, outputs)
            penalty = tf.add_n([tf.nn.l2_loss(v) for v in model.trainable_variables])
            both = loss + 0.01 * penalty
        weights = model.trainable_variables
        return {
            "gradients": tape.gradient(both, weights),
            "penalties": tape.gradient(penalty, weights),
            "nothing": tape.gradient(tf.reduce_sum(x), weights),
            "input": tape.gradient(loss, x),
            "losses": (loss, penalty),
        }

    keys = ("gradients", "penalties", "nothing")
    return Script(step, [model], lambda: dict.fromkeys(keys, trainable(model)))


def total_loss(base: type) -> Script:
    """A loss with a term for each weight; the sum is differentiated."""
    model = stack(base)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = cross_entropy(y, model(x, training=True))
            penalty = tf.add_n([tf.nn.l2_loss(v) for v in model.trainable_variables])
            total = loss + 0.01 * penalty
        return {
            "gradients": tape.gradient(total, model.trainable_variables),
            "loss": total,
        }

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def second_order(base: type) -> Script:
    """A gradient penalty: the norm of the gradient by the input is part of the loss."""
    model = stack(base)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            with tf.GradientTape() as inner:
                inner.watch(x)
                outputs = model(x, training=True)
                score = tf.reduce_sum(outputs)
            slope = inner.gradient(score, x)
            penalty = tf.reduce_mean(tf.square(tf.norm(slope, axis=-1) - 1.0))
            loss = cross_entropy(y, outputs) + penalty
        gradients = tape.gradient(loss, model.trainable_variables)
        return {"gradients": gradients, "loss": loss}

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def graph_gradients(base: type) -> Script:
    """tf.gradients."""
    model = stack(base)

    def step(x: Any, y: Any) -> Any:
        loss = cross_entropy(y, model(x, training=True))
        return {"gradients": tf.gradients(loss, model.trainable_variables)}

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def pairs(base: type) -> Script:
    """A new optimizer's compute_gradients, which returns (gradient, variable) pairs."""
    model = stack(base)
    optimizer = tf.keras.optimizers.SGD(0.1)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = cross_entropy(y, model(x, training=True))
        found = optimizer.compute_gradients(loss, model.trainable_variables, tape)
        return {"gradients": [gradient for gradient, _ in found], "pairs": list(found)}

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def clipped(base: type) -> Script:
    """Each gradient clipped and scaled in the step; a loss scale around it."""
    model = stack(base)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = 8.0 * cross_entropy(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        gradients = [tf.clip_by_norm(g / 8.0, 0.05) for g in gradients]
        return {"gradients": gradients, "loss": loss}

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def global_norm(base: type) -> Script:
    """All gradients clipped by their common norm in the step, which is returned."""
    model = stack(base)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = cross_entropy(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        gradients, norm = tf.clip_by_global_norm(gradients, 0.1)
        return {"gradients": gradients, "loss": loss, "norm": norm}

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def by_name(base: type) -> Script:
    """Gradients in a dict, by the variables' names."""
    model = stack(base)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = cross_entropy(y, model(x, training=True))
        weights = {v.name: v for v in model.trainable_variables}
        return {"by_name": tape.gradient(loss, weights), "loss": loss}

    return Script(step, [model])


def adversarial(base: type) -> Script:
    """A generator and a discriminator with their own gradients."""
    maker, judge = stack(base, "maker", 8), stack(base, "judge", 1)

    def step(x: Any, y: Any) -> Any:
        bce = tf.nn.sigmoid_cross_entropy_with_logits
        with tf.GradientTape(persistent=True) as tape:
            made = maker(tf.reverse(x, [1]), training=True)
            real, fake = judge(x, training=True), judge(made, training=True)
            judge_loss = tf.reduce_mean(
                bce(tf.ones_like(real), real) + bce(tf.zeros_like(fake), fake)
            )
            maker_loss = tf.reduce_mean(bce(tf.ones_like(fake), fake))
        return {
            "maker": tape.gradient(maker_loss, maker.trainable_variables),
            "judge": tape.gradient(judge_loss, judge.trainable_variables),
            "losses": (maker_loss, judge_loss),
        }

    return Script(
        step,
        [maker, judge],
        lambda: {"maker": trainable(maker), "judge": trainable(judge)},
    )


def distilled(base: type) -> Script:
    """A frozen teacher and its student."""
    teacher, student = stack(base, "teacher"), stack(base, "student")
    teacher.trainable = False

    def step(x: Any, y: Any) -> Any:
        target = tf.nn.softmax(teacher(x, training=False))
        with tf.GradientTape() as tape:
            logits = student(x, training=True)
            soft = tf.nn.softmax_cross_entropy_with_logits(target, logits)
            loss = cross_entropy(y, logits) + tf.reduce_mean(soft)
        gradients = tape.gradient(loss, student.trainable_variables)
        return {"gradients": gradients, "loss": loss}

    return Script(step, [teacher, student], lambda: {"gradients": trainable(student)})


CASES = [
    ScriptCase(build.__name__, build, vectors(), classes(), style)
    for build, style in (
        (persistent, "persistent tape"),
        (total_loss, "tape"),
        (second_order, "nested tapes"),
        (graph_gradients, "tf.gradients"),
        (pairs, "compute_gradients"),
        (clipped, "tape"),
        (global_norm, "tape"),
        (by_name, "tape"),
        (adversarial, "persistent tape"),
        (distilled, "tape"),
    )
]
