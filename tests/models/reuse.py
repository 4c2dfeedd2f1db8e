"""Shapes of models: layers used many times, nested models, what feeds everything."""

import collections
from typing import Any

import tensorflow as tf

from tests.models.script import (
    Script,
    ScriptCase,
    classes,
    cross_entropy,
    layers,
    tokens,
    train,
    trainable,
    vectors,
)


class Block(layers.Layer):
    """Attention, optionally to a memory, and a feed-forward part."""

    def __init__(self, dim: int, name: str, has_memory: bool = False) -> None:
        super().__init__(name=name)
        self.attend = layers.MultiHeadAttention(2, dim // 2)
        self.look = layers.MultiHeadAttention(2, dim // 2) if has_memory else None
        self.norms = [layers.LayerNormalization() for _ in range(3)]
        self.up = layers.Dense(2 * dim, activation="gelu")
        self.down = layers.Dense(dim)

    def call(self, x: tf.Tensor, memory: tf.Tensor | None = None) -> tf.Tensor:
        y = self.norms[0](x)
        x = x + self.attend(y, y)
        if self.look is not None:
            x = x + self.look(self.norms[1](x), memory)
        return x + self.down(self.up(self.norms[2](x)))


def one_block(base: type) -> Script:
    """A transformer that uses one block for all its layers; an untied embedding, whose
    gradient is sparse."""

    class OneBlock(base):
        def __init__(self) -> None:
            super().__init__(name="one_block")
            self.embed = layers.Embedding(20, 8)
            self.block = Block(8, "block")
            self.head = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = self.embed(x)
            for _ in range(4):
                x = self.block(x)
            return self.head(tf.reduce_mean(x, 1))

    return train(OneBlock())


def encoder_decoder(base: type) -> Script:
    """The encoder's output feeds all decoder blocks; two embeddings."""

    class EncoderDecoder(base):
        def __init__(self) -> None:
            super().__init__(name="encoder_decoder")
            self.source = layers.Embedding(20, 8)
            self.target = layers.Embedding(20, 8)
            self.encoder = [Block(8, f"encoder_{i}") for i in range(2)]
            self.decoder = [Block(8, f"decoder_{i}", True) for i in range(3)]
            self.head = layers.Dense(6)

        def call(self, x: Any, training: bool | None = None) -> tf.Tensor:
            memory, y = self.source(x["source"]), self.target(x["target"])
            for block in self.encoder:
                memory = block(memory)
            for block in self.decoder:
                y = block(y, memory)
            return self.head(tf.reduce_mean(y, 1))

    return train(EncoderDecoder())


def nested(base: type) -> Script:
    """Functional, Sequential and subclassed models inside a model."""

    class Inner(tf.keras.Model):
        def __init__(self) -> None:
            super().__init__(name="inner")
            self.dense = layers.Dense(8, activation="relu")

        def call(self, x: tf.Tensor) -> tf.Tensor:
            return self.dense(x) + x

    class Nested(base):
        def __init__(self) -> None:
            super().__init__(name="nested")
            given = layers.Input([8])
            left = layers.Dense(8, activation="relu")(given)
            right = layers.Dense(8)(left)
            joined = layers.Concatenate()([left, right, given])
            self.functional = tf.keras.Model(given, [layers.Dense(8)(joined), left])
            self.sequence = tf.keras.Sequential(
                [layers.Dense(8, activation="relu"), layers.BatchNormalization()]
            )
            self.inner = Inner()
            self.head = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x, left = self.functional(x)
            x = self.inner(self.sequence(x, training=training))
            x = self.inner(x) + left
            return self.head(self.functional(x)[0])

    return train(Nested())


def unused(base: type) -> Script:
    """Variables without a gradient, one that nothing uses, a frozen layer."""

    class Unused(base):
        def __init__(self) -> None:
            super().__init__(name="unused")
            self.one = layers.Dense(8, activation="relu")
            self.side = layers.Dense(8)
            self.spare = self.add_weight(name="spare", shape=[3])
            self.frozen = layers.Dense(8, trainable=False)
            self.more = [layers.Dense(8, activation="relu") for _ in range(3)]
            self.two = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = self.one(x)
            tf.reduce_sum(self.side(x))
            x = self.frozen(x)
            for layer in self.more:
                x = layer(x)
            return self.two(x)

    return train(Unused())


Result = collections.namedtuple("Result", ["logits", "hidden", "count", "name"])


class Output(collections.OrderedDict):
    """What Hugging Face models return: a dict with attributes."""

    def __getattr__(self, name: str) -> Any:
        if name in self:
            return self[name]
        raise AttributeError(name)


def structures(base: type) -> Script:
    """A model and a step that return tuples, named tuples, dicts with attributes,
    Python values, None, tuples of tensors, an input and a constant."""

    class Structures(base):
        def __init__(self) -> None:
            super().__init__(name="structures")
            self.one = layers.Dense(8, activation="relu")
            self.more = [layers.Dense(8, activation="relu") for _ in range(3)]
            self.head = layers.Dense(6)

        def call(self, x: tf.Tensor, training: bool | None = None) -> Any:
            hidden = [self.one(x)]
            for layer in self.more:
                hidden.append(layer(hidden[-1]))
            result = Result(self.head(hidden[-1]), tuple(hidden), 2, "text")
            return Output(result=result, none=None, same=x)

    model = Structures()

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = cross_entropy(y, outputs.result.logits)
        gradients = tape.gradient(loss, model.trainable_variables)
        return {
            "gradients": gradients,
            "rest": (loss, outputs, [outputs.result.count, None], y, tf.constant(3)),
            "named": Result(loss, None, 1, {"a": loss, "b": "c"}),
        }

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def no_layers(base: type) -> Script:
    """Raw variables and operations only."""

    class NoLayers(base):
        def __init__(self) -> None:
            super().__init__(name="no_layers")
            self.w = [self.add_weight(name=f"w{i}", shape=[8, 8]) for i in range(4)]
            self.scale = tf.Variable(1.5, name="scale")

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            for w in self.w:
                x = tf.nn.relu(x @ w) + x
            return x * self.scale

    return train(NoLayers())


CASES = [
    ScriptCase("one_block", one_block, tokens(), classes()),
    ScriptCase(
        "encoder_decoder",
        encoder_decoder,
        lambda r, n: {"source": tokens(5)(r, n), "target": tokens(4)(r, n)},
        classes(),
    ),
    ScriptCase("nested", nested, vectors(), classes()),
    ScriptCase("unused", unused, vectors(), classes()),
    ScriptCase("structures", structures, vectors(), classes()),
    ScriptCase("no_layers", no_layers, vectors(), classes()),
]
