"""Ways of taking gradients, several models in one step, other dtypes."""

from typing import Any

import tensorflow as tf

from tests.models.script import (
    Script,
    ScriptCase,
    classes,
    cross_entropy,
    layers,
    train,
    trainable,
    vectors,
)


def _stack(base: type, name: str = "stack", out: int = 6, **options: Any) -> Any:
    class Stack(base):
        def __init__(self) -> None:
            super().__init__(name=name)
            self.parts = [
                layers.Dense(8, activation="tanh", name=f"part_{i}", **options)
                for i in range(3)
            ]
            self.head = layers.Dense(out, name="head", **options)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            for part in self.parts:
                x = part(x)
            return self.head(x)

    return Stack()


def persistent(base: type) -> Script:
    """Two losses from one persistent tape; gradients of an input; several lists."""
    model = _stack(base)

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
    model = _stack(base)

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
    model = _stack(base)

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
    model = _stack(base)

    def step(x: Any, y: Any) -> Any:
        loss = cross_entropy(y, model(x, training=True))
        return {"gradients": tf.gradients(loss, model.trainable_variables)}

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def pairs(base: type) -> Script:
    """A new optimizer's compute_gradients, which returns (gradient, variable) pairs."""
    model = _stack(base)
    optimizer = tf.keras.optimizers.SGD(0.1)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = cross_entropy(y, model(x, training=True))
        found = optimizer.compute_gradients(loss, model.trainable_variables, tape)
        return {"gradients": [gradient for gradient, _ in found], "pairs": list(found)}

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def clipped(base: type) -> Script:
    """Each gradient clipped and scaled in the step; a loss scale around it."""
    model = _stack(base)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = 8.0 * cross_entropy(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        gradients = [tf.clip_by_norm(g / 8.0, 0.05) for g in gradients]
        return {"gradients": gradients, "loss": loss}

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def global_norm(base: type) -> Script:
    """All gradients clipped by their common norm in the step, which is returned."""
    model = _stack(base)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = cross_entropy(y, model(x, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        gradients, norm = tf.clip_by_global_norm(gradients, 0.1)
        return {"gradients": gradients, "loss": loss, "norm": norm}

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def by_name(base: type) -> Script:
    """Gradients in a dict, by the variables' names."""
    model = _stack(base)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = cross_entropy(y, model(x, training=True))
        weights = {v.name: v for v in model.trainable_variables}
        return {"by_name": tape.gradient(loss, weights), "loss": loss}

    return Script(step, [model])


def adversarial(base: type) -> Script:
    """A generator and a discriminator with their own gradients."""
    maker, judge = _stack(base, "maker", 8), _stack(base, "judge", 1)

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
    teacher, student = _stack(base, "teacher"), _stack(base, "student")
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


def _typed(dtype: str) -> Any:
    def build(base: type) -> Script:
        model = _stack(base, dtype=dtype)

        def step(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                outputs = model(tf.cast(x, dtype), training=True)
                loss = cross_entropy(y, outputs)
            gradients = tape.gradient(loss, model.trainable_variables)
            return {"gradients": gradients, "loss": loss, "outputs": outputs}

        return Script(step, [model], lambda: {"gradients": trainable(model)})

    return build


def mixed_policy(base: type) -> Script:
    """Layers under mixed_bfloat16: weights are cast where they are used."""
    return train(
        _stack(base, dtype="mixed_bfloat16"),
        lambda y, logits: cross_entropy(y, tf.cast(logits, tf.float32)),
    )


def plain_types(base: type) -> Script:
    """Integers, bools and strings travel with the activations."""

    class Types(base):
        def __init__(self) -> None:
            super().__init__(name="types")
            self.one = layers.Dense(8, activation="relu")
            self.two = layers.Dense(8)
            self.three = layers.Dense(6)

        def call(self, x: Any, training: bool | None = None) -> Any:
            length = tf.strings.length(x["text"])
            keep = length > 2
            h = self.one(x["dense"])
            h = tf.where(keep[:, tf.newaxis], self.two(h), h)
            rank = tf.argsort(h, axis=-1)
            h = self.three(h) * tf.cast(length, h.dtype)[:, tf.newaxis]
            words = tf.strings.join([x["text"], tf.strings.as_string(length)])
            return {"logits": h, "rank": rank, "keep": keep, "hash": words}

    model = Types()

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = cross_entropy(y, outputs["logits"])
        words = outputs.pop("hash")
        return {
            "gradients": tape.gradient(loss, model.trainable_variables),
            "outputs": outputs,
            "bucket": tf.strings.to_hash_bucket_fast(words, 100),
        }

    return Script(step, [model], lambda: {"gradients": trainable(model)})


CASES = [
    ScriptCase(build.__name__, build, vectors(), classes())
    for build in (
        persistent,
        total_loss,
        second_order,
        graph_gradients,
        pairs,
        clipped,
        global_norm,
        by_name,
        adversarial,
        distilled,
        mixed_policy,
    )
] + [
    *(
        ScriptCase(dtype, _typed(dtype), vectors(), classes())
        for dtype in ("float64", "bfloat16", "float16")
    ),
    ScriptCase(
        "plain_types",
        plain_types,
        lambda r, n: {
            "dense": vectors()(r, n),
            "text": tf.constant(["a" * (1 + i % 4) for i in range(n)]),
        },
        classes(),
    ),
]
