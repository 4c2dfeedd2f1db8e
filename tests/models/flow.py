"""Control flow inside ``call``: loops, branches, recurrent layers, inner functions."""

from typing import Any

import tensorflow as tf

from tests.models.script import (
    Script,
    ScriptCase,
    classes,
    layers,
    tokens,
    train,
    vectors,
)


def recurrent(base: type) -> Script:
    """Bidirectional LSTM, GRU, and a cell run by hand."""

    class Recurrent(base):
        def __init__(self) -> None:
            super().__init__(name="recurrent")
            self.embed = layers.Embedding(20, 6)
            self.both = layers.Bidirectional(layers.LSTM(4, return_sequences=True))
            self.gru = layers.GRU(5, return_sequences=True)
            self.rnn = layers.RNN(layers.LSTMCell(4))
            self.head = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            return self.head(self.rnn(self.gru(self.both(self.embed(x)))))

    return train(Recurrent())


def masked_recurrent(base: type) -> Script:
    """A mask from the embedding, kept by two LSTMs."""

    class Masked(base):
        def __init__(self) -> None:
            super().__init__(name="masked")
            self.embed = layers.Embedding(20, 6, mask_zero=True)
            self.one = layers.LSTM(4, return_sequences=True)
            self.two = layers.LSTM(4)
            self.head = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            return self.head(self.two(self.one(self.embed(x))))

    return train(Masked())


def loops(base: type) -> Script:
    """tf.while_loop with a weight in its body, tf.cond, tf.map_fn."""

    class Loops(base):
        def __init__(self) -> None:
            super().__init__(name="loops")
            self.first = layers.Dense(8)
            self.inner = layers.Dense(8, activation="tanh")
            self.inner.build([None, 8])
            self.branch = layers.Dense(8)
            self.last = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = self.first(x)
            _, x = tf.while_loop(
                lambda i, _: i < 3,
                lambda i, y: (i + 1, tf.tanh(y @ self.inner.kernel)),
                [0, x],
            )
            x = self.branch(x)
            x = tf.cond(tf.reduce_sum(x) > 0.0, lambda: x * 2.0, lambda: x - 1.0)
            x = tf.map_fn(lambda row: row * tf.reduce_max(row), x)
            return self.last(x)

    return train(Loops())


def autograph(base: type) -> Script:
    """Python loops and branches over tensors, layers called inside them."""

    class AutoGraph(base):
        def __init__(self) -> None:
            super().__init__(name="autograph")
            self.first = layers.Dense(8, activation="tanh")
            self.inner = layers.Dense(8, activation="tanh")
            self.other = layers.Dense(8, activation="tanh")
            self.last = layers.Dense(6)
            self.inner.build([None, 8])
            self.other.build([None, 8])

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = self.first(x)
            for _ in tf.range(3):
                x = self.inner(x)
            if tf.reduce_mean(x) > 0.0:
                x = self.other(x)
            else:
                x = self.other(-x)
            return self.last(x)

    return train(AutoGraph())


def functions(base: type) -> Script:
    """tf.functions inside ``call``: one around a block, one method."""

    class Block(layers.Layer):
        def __init__(self, name: str) -> None:
            super().__init__(name=name)
            self.up = layers.Dense(12, activation="tanh")
            self.down = layers.Dense(8)

        @tf.function
        def call(self, x: tf.Tensor) -> tf.Tensor:
            return x + self.down(self.up(x))

    class Functions(base):
        def __init__(self) -> None:
            super().__init__(name="functions")
            self.blocks = [Block(f"block_{i}") for i in range(3)]
            for block in self.blocks:
                block.up.build([None, 8])
                block.down.build([None, 12])
            self.head = layers.Dense(6)

        @tf.function
        def body(self, x: tf.Tensor) -> tf.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            return self.head(self.body(x))

    return train(Functions())


def whole_function(base: type) -> Script:
    """``call`` itself is a tf.function."""

    class Whole(base):
        def __init__(self) -> None:
            super().__init__(name="whole")
            self.dense = [layers.Dense(8, activation="relu") for _ in range(3)]
            self.drop = layers.Dropout(0.5, seed=3)
            self.head = layers.Dense(6)
            for layer in (*self.dense, self.head):
                layer.build([None, 8])

        @tf.function
        def call(self, x: tf.Tensor, training: Any = None) -> tf.Tensor:
            for layer in self.dense:
                x = self.drop(layer(x), training=training)
            return self.head(x)

    return train(Whole())


def custom_gradients(base: type) -> Script:
    """tf.custom_gradient, with and without variables, and tf.recompute_grad."""

    @tf.custom_gradient
    def clipped(x: tf.Tensor) -> Any:
        return tf.identity(x), lambda g: tf.clip_by_value(g, -0.01, 0.01)

    class Custom(base):
        def __init__(self) -> None:
            super().__init__(name="custom")
            self.one = layers.Dense(8, activation="tanh")
            self.two = layers.Dense(8, activation="tanh")
            self.three = layers.Dense(6)
            self.two.build([None, 8])

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = clipped(self.one(x))
            x = tf.recompute_grad(self.two)(x)
            return self.three(clipped(x))

    return train(Custom())


CASES = [
    ScriptCase("recurrent", recurrent, tokens(), classes()),
    ScriptCase("masked_recurrent", masked_recurrent, tokens(), classes()),
    ScriptCase("loops", loops, vectors(), classes()),
    ScriptCase("autograph", autograph, vectors(), classes()),
    ScriptCase("functions", functions, vectors(), classes()),
    ScriptCase("whole_function", whole_function, vectors(), classes()),
    ScriptCase("custom_gradients", custom_gradients, vectors(), classes()),
]
