"""State that a step changes: metrics, counters, generators, variables of the user."""

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


def _dense(base: type, middle: Any = None) -> Any:
    """Dense layers; ``middle`` is called between them."""

    class Stack(base):
        def __init__(self) -> None:
            super().__init__(name="stack")
            self.one = layers.Dense(8, activation="relu")
            self.two = layers.Dense(8, activation="relu")
            self.three = layers.Dense(8, activation="relu")
            self.head = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = self.two(self.one(x))
            return self.head(self.three(x if middle is None else middle(x)))

    return Stack()


def metrics(base: type) -> Script:
    """Keras metrics and a counter updated in the step, their results returned."""
    model = _dense(base)
    mean = tf.keras.metrics.Mean()
    accuracy = tf.keras.metrics.SparseCategoricalAccuracy()
    counter = tf.Variable(0, dtype=tf.int64, trainable=False)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = cross_entropy(y, outputs)
        gradients = tape.gradient(loss, model.trainable_variables)
        mean.update_state(loss)
        accuracy.update_state(y, outputs)
        counter.assign_add(1)
        return {"gradients": gradients, "mean": mean.result(), "counter": counter}

    return Script(
        step,
        [model],
        lambda: {"gradients": trainable(model)},
        [*mean.variables, *accuracy.variables, counter],
    )


def counters(base: type) -> Script:
    """Counters of layers and of the model, changed and used in ``call``."""

    class Counting(layers.Layer):
        def __init__(self) -> None:
            super().__init__()
            self.count = self.add_weight(
                name="count", shape=[], initializer="zeros", trainable=False
            )

        def call(self, x: tf.Tensor) -> tf.Tensor:
            self.count.assign_add(1.0)
            return x * (1.0 + 0.1 * self.count)

    class Counters(base):
        def __init__(self) -> None:
            super().__init__(name="counters")
            self.one = layers.Dense(8, activation="relu")
            self.counting = Counting()
            self.two = layers.Dense(8, activation="relu")
            self.counting_again = Counting()
            self.three = layers.Dense(6)
            self.calls = tf.Variable(0, trainable=False)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            self.calls.assign_add(1)
            x = self.counting(self.one(x))
            return self.three(self.counting_again(self.two(x)))

    return train(Counters())


def generator(base: type) -> Script:
    """Noise from a tf.random.Generator in ``call``, and from one in the step."""
    inside = tf.random.Generator.from_seed(3)
    outside = tf.random.Generator.from_seed(4)
    model = _dense(base, lambda x: x + inside.normal(tf.shape(x)))

    def step(x: Any, y: Any) -> Any:
        x = x + outside.normal(tf.shape(x))
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = cross_entropy(y, outputs)
        gradients = tape.gradient(loss, model.trainable_variables)
        return {"gradients": gradients, "loss": loss}

    return Script(
        step,
        [model],
        lambda: {"gradients": trainable(model)},
        [inside.state, outside.state],
    )


def dropout(base: type) -> Script:
    """Dropout without a seed, under ``set_random_seed``."""

    class Dropping(base):
        def __init__(self) -> None:
            super().__init__(name="dropping")
            self.dense = [layers.Dense(8, activation="relu") for _ in range(3)]
            self.drop = [layers.Dropout(0.5) for _ in range(3)]
            self.noise = layers.GaussianNoise(0.1)
            self.head = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            for dense, drop in zip(self.dense, self.drop):
                x = drop(dense(self.noise(x, training=training)), training=training)
            return self.head(x)

    return train(Dropping())


def assigned(base: type) -> Script:
    """The user's variables: an average of a weight, of the loss, a saved batch."""
    model = _dense(base)
    average = tf.Variable(tf.zeros([6]), trainable=False)
    smooth = tf.Variable(0.0, trainable=False)
    last = tf.Variable(tf.zeros([8]), trainable=False)

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = cross_entropy(y, outputs)
        gradients = tape.gradient(loss, model.trainable_variables)
        average.assign(0.9 * average + 0.1 * model.head.bias + 0.2)
        smooth.assign(0.9 * smooth + 0.1 * loss)
        last.assign(tf.reduce_sum(x, 0))
        return {"gradients": gradients, "loss": loss, "smooth": smooth + 1.0}

    return Script(
        step,
        [model],
        lambda: {"gradients": trainable(model)},
        [average, smooth, last],
    )


def weights_written(base: type) -> Script:
    """A layer that normalises its own weight in ``call`` (spectral normalisation)."""

    class Spectral(layers.Layer):
        def build(self, shape: Any) -> None:
            self.w = self.add_weight(name="w", shape=[shape[-1], 8])
            self.u = self.add_weight(name="u", shape=[1, 8], trainable=False)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            if training:
                v = tf.math.l2_normalize(tf.matmul(self.u, self.w, transpose_b=True))
                u = tf.math.l2_normalize(tf.matmul(v, self.w))
                sigma = tf.matmul(tf.matmul(v, self.w), u, transpose_b=True)
                self.w.assign(self.w / sigma)
                self.u.assign(u)
            return x @ self.w

    class Normalised(base):
        def __init__(self) -> None:
            super().__init__(name="normalised")
            self.one = layers.Dense(8, activation="relu")
            self.spectral = [Spectral() for _ in range(2)]
            self.head = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = self.one(x)
            for layer in self.spectral:
                x = tf.nn.relu(layer(x, training=training))
            return self.head(x)

    return train(Normalised())


def shared_norm(base: type) -> Script:
    """One BatchNorm used at two depths: its averages are written twice."""

    class SharedNorm(base):
        def __init__(self) -> None:
            super().__init__(name="shared_norm")
            self.one = layers.Dense(8, activation="relu")
            self.norm = layers.BatchNormalization()
            self.two = layers.Dense(8, activation="relu")
            self.three = layers.Dense(8, activation="relu")
            self.head = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = self.norm(self.one(x), training=training)
            x = self.three(self.two(x))
            return self.head(self.norm(x, training=training))

    return train(SharedNorm())


CASES = [
    ScriptCase("metrics", metrics, vectors(), classes()),
    ScriptCase("counters", counters, vectors(), classes()),
    ScriptCase("generator", generator, vectors(), classes()),
    ScriptCase("dropout", dropout, vectors(), classes()),
    ScriptCase("assigned", assigned, vectors(), classes()),
    ScriptCase("weights_written", weights_written, vectors(), classes()),
    ScriptCase("shared_norm", shared_norm, vectors(), classes()),
]
