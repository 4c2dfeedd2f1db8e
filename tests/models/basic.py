"""Models, data and step functions of the gradient tests; small real models.

Every case builds the same model twice: on a base class of plain Keras for the truth
(one process, one ``tf.function`` call per microbatch), and on ``smp.DistributedModel``.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

layers = tf.keras.layers


def mlp(base: type) -> Any:
    """Uneven dense layers."""

    class MLP(base):
        def __init__(self) -> None:
            super().__init__(name="mlp")
            self.hidden = [layers.Dense(n, activation="relu") for n in (24, 40, 16, 32)]
            self.head = layers.Dense(10)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            for layer in self.hidden:
                x = layer(x)
            return self.head(x)

    return MLP()


def conv(base: type) -> Any:
    """Convolutions, both kinds of BatchNorm, dropout with a seed."""

    class Conv(base):
        def __init__(self) -> None:
            super().__init__(name="conv")
            self.conv1 = layers.Conv2D(4, 3, padding="same")
            self.norm1 = layers.BatchNormalization()
            self.conv2 = layers.Conv2D(6, 3, padding="same", strides=2)
            self.norm2 = layers.BatchNormalization(fused=False)
            self.drop = layers.Dropout(0.5, seed=7)
            self.flat = layers.Flatten()
            self.hidden = layers.Dense(16, activation="relu")
            self.drop2 = layers.Dropout(0.3, seed=11)
            self.head = layers.Dense(10)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = tf.nn.relu(self.norm1(self.conv1(x), training=training))
            x = tf.nn.relu(self.norm2(self.conv2(x), training=training))
            x = self.drop(self.flat(x), training=training)
            return self.head(self.drop2(self.hidden(x), training=training))

    return Conv()


def transformer(base: type) -> Any:
    """Two attention blocks; the embedding is the head too."""

    class Transformer(base):
        def __init__(self, vocabulary: int = 20, dim: int = 8) -> None:
            super().__init__(name="transformer")
            self.embed = layers.Embedding(vocabulary, dim)
            self.attend = [layers.MultiHeadAttention(2, dim // 2) for _ in range(2)]
            self.norms = [layers.LayerNormalization() for _ in range(4)]
            self.up = [layers.Dense(2 * dim, activation="gelu") for _ in range(2)]
            self.down = [layers.Dense(dim) for _ in range(2)]
            self.final = layers.LayerNormalization()

        def call(self, tokens: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = self.embed(tokens)
            mask = tf.linalg.band_part(tf.ones([tokens.shape[1]] * 2), -1, 0)
            for i in range(2):
                y = self.norms[2 * i](x)
                x = x + self.attend[i](y, y, attention_mask=mask[tf.newaxis])
                x = x + self.down[i](self.up[i](self.norms[2 * i + 1](x)))
            return tf.matmul(self.final(x), self.embed.embeddings, transpose_b=True)

    return Transformer()


def two_towers(base: type) -> Any:
    """Two inputs, two outputs, a tensor that skips partitions."""

    class TwoTowers(base):
        def __init__(self) -> None:
            super().__init__(name="towers")
            self.left = layers.Dense(16, activation="tanh")
            self.right = layers.Dense(12, activation="tanh")
            self.mix = layers.Dense(16, activation="relu")
            self.deep = layers.Dense(16, activation="relu")
            self.label = layers.Dense(10)
            self.value = layers.Dense(1)

        def call(
            self, x: dict[str, tf.Tensor], training: bool | None = None
        ) -> dict[str, tf.Tensor]:
            left, right = self.left(x["left"]), self.right(x["right"])
            mixed = self.mix(tf.concat([left, right], -1))
            deep = self.deep(mixed) + left
            return {"label": self.label(deep), "value": self.value(mixed)}

    return TwoTowers()


@dataclasses.dataclass(frozen=True)
class Case:
    """A model with the data it takes and the loss it is trained with."""

    name: str
    build: Callable[[type], Any]
    features: Callable[[np.random.RandomState, int], Any]
    labels: Callable[[np.random.RandomState, int], Any]

    def data(self, batch: int) -> tuple[Any, Any]:
        random = np.random.RandomState(0)
        x = tf.nest.map_structure(tf.constant, self.features(random, batch))
        return x, tf.nest.map_structure(tf.constant, self.labels(random, batch))


def loss_of(labels: Any, outputs: Any) -> tf.Tensor:
    cross_entropy = tf.keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    if isinstance(outputs, dict):
        error = tf.reduce_mean(tf.square(outputs["value"] - labels["value"]))
        return cross_entropy(labels["label"], outputs["label"]) + 0.5 * error
    return cross_entropy(labels, outputs)


def _classes(random: np.random.RandomState, batch: int) -> Any:
    return random.randint(0, 10, batch)


CASES = {
    case.name: case
    for case in (
        Case("mlp", mlp, lambda r, n: r.rand(n, 32).astype("f"), _classes),
        Case("conv", conv, lambda r, n: r.rand(n, 8, 8, 3).astype("f"), _classes),
        Case(
            "transformer",
            transformer,
            lambda r, n: r.randint(0, 20, (n, 6)),
            lambda r, n: r.randint(0, 20, (n, 6)),
        ),
        Case(
            "two_towers",
            two_towers,
            lambda r, n: {
                "left": r.rand(n, 9).astype("f"),
                "right": r.rand(n, 5).astype("f"),
            },
            lambda r, n: {
                "label": r.randint(0, 10, n),
                "value": r.rand(n, 1).astype("f"),
            },
        ),
    )
}


def tape_step(model: Any) -> Callable[..., Any]:
    """Gradients by a tape."""

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = loss_of(y, outputs)
        return tape.gradient(loss, model.trainable_variables), loss, outputs

    return step


def legacy_step(model: Any) -> Callable[..., Any]:
    """Gradients by a legacy Keras optimizer, the way SMP's documentation writes it."""
    optimizer = tf.keras.optimizers.legacy.Adam()

    def step(x: Any, y: Any) -> Any:
        outputs = model(x, training=True)
        loss = loss_of(y, outputs)
        return optimizer.get_gradients(loss, model.trainable_variables), loss, outputs

    return step


STEPS = {"tape": tape_step, "legacy": legacy_step}
