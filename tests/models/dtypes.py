"""Types of tensors: floating point of all sizes, whole numbers, bools, strings."""

from typing import Any

import tensorflow as tf

from tests.models.script import (
    Script,
    ScriptCase,
    classes,
    cross_entropy,
    layers,
    stack,
    train,
    trainable,
    vectors,
)


def _typed(dtype: str) -> Any:
    def build(base: type) -> Script:
        model = stack(base, dtype=dtype)

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
        stack(base, dtype="mixed_bfloat16"),
        lambda y, logits: cross_entropy(y, tf.cast(logits, tf.float32)),
    )


def mixed_float16(base: type) -> Script:
    """Layers under mixed_float16; the loss is scaled, and the gradients back."""
    model = stack(base, dtype="mixed_float16")

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            logits = tf.cast(model(x, training=True), tf.float32)
            loss = cross_entropy(y, logits)
            scaled = loss * 128.0
        gradients = tape.gradient(scaled, model.trainable_variables)
        return {"gradients": [g / 128.0 for g in gradients], "loss": loss}

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def complex_numbers(base: type) -> Script:
    """Complex tensors between layers, a Fourier transform, a complex gradient."""

    class Complex(base):
        def __init__(self) -> None:
            super().__init__(name="complex")
            self.real = layers.Dense(8)
            self.imaginary = layers.Dense(8)
            self.middle = [layers.Dense(8, activation="tanh") for _ in range(2)]
            self.head = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            wave = tf.complex(self.real(x), self.imaginary(x))
            h = self.middle[0](tf.math.real(wave))
            wave = tf.signal.fft(wave * tf.cast(h, wave.dtype))
            h = self.middle[1](tf.abs(wave))
            return self.head(h + tf.math.imag(tf.signal.ifft(wave)))

    return train(Complex())


def whole_numbers(base: type) -> Script:
    """Bytes in, positions and choices of int32, int64, uint8 and bool in between."""

    class Whole(base):
        def __init__(self) -> None:
            super().__init__(name="whole")
            self.one = layers.Dense(8, activation="tanh")
            self.codes = layers.Embedding(8, 8)
            self.two = layers.Dense(8, activation="tanh")
            self.three = layers.Dense(8)
            self.head = layers.Dense(6)

        def call(self, x: Any, training: bool | None = None) -> Any:
            h = self.one(tf.cast(x["bytes"], tf.float32) / 255.0)
            code = tf.argmax(h, -1)
            level = tf.cast(tf.clip_by_value(h * 9.0 + 9.0, 0.0, 18.0), tf.uint8)
            h = self.two(h) + self.codes(code)
            order = tf.argsort(h, axis=-1)
            is_large = level > tf.cast(tf.reduce_mean(x["number"]), tf.uint8)
            h = tf.gather(self.three(h), order, batch_dims=1)
            h = self.head(tf.where(is_large, h, -h))
            return {"logits": h, "code": code, "level": level, "is_large": is_large}

    model = Whole()

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = cross_entropy(y, outputs["logits"])
        gradients = tape.gradient(loss, model.trainable_variables)
        return {"gradients": gradients, "outputs": outputs}

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def strings_inside(base: type) -> Script:
    """Strings made of activations, kept over a few layers, then looked up."""

    class Words(base):
        def __init__(self) -> None:
            super().__init__(name="words")
            self.parts = [layers.Dense(8, activation="tanh") for _ in range(4)]
            self.lookup = layers.Embedding(16, 8)
            self.head = layers.Dense(6)

        def call(self, x: Any, training: bool | None = None) -> tf.Tensor:
            h = self.parts[0](x["dense"])
            word = tf.strings.as_string(tf.argmax(h, -1))
            word = tf.strings.join([x["text"], word], "-")
            h = self.parts[2](self.parts[1](h))
            h = h + self.lookup(tf.strings.to_hash_bucket_fast(word, 16))
            return self.head(self.parts[3](h))

    return train(Words())


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
    *(
        ScriptCase(dtype, _typed(dtype), vectors(), classes())
        for dtype in ("float64", "bfloat16", "float16")
    ),
    *(
        ScriptCase(build.__name__, build, vectors(), classes())
        for build in (mixed_policy, mixed_float16, complex_numbers)
    ),
    ScriptCase(
        "whole_numbers",
        whole_numbers,
        lambda r, n: {
            "bytes": r.randint(0, 256, (n, 8)).astype("u1"),
            "number": r.randint(0, 20, n),
        },
        classes(),
    ),
    *(
        ScriptCase(
            build.__name__,
            build,
            lambda r, n: {
                "dense": vectors()(r, n),
                "text": tf.constant(["a" * (1 + i % 4) for i in range(n)]),
            },
            classes(),
        )
        for build in (plain_types, strings_inside)
    ),
]
