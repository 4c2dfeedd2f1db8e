"""The graphs of `partition_quality.py`: models of realistic size, traced, never run.

Each is a DistributedModel, so that none of its variables takes memory: GPT-2 XL has
6 GB of weights. Where a published implementation exists it is used
(`tf_keras.applications`, Hugging Face); the others are written here with ordinary Keras
layers. All of them are classifiers of some kind (of images, pixels, tokens or pairs):
`call` gives logits, the step adds the cross entropy and the gradients of all weights.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Mapping
from typing import Any

import smp_tf as smp  # isort: skip  (first: it selects Keras 2)

import tensorflow as tf
import tf_keras as keras

from smp_tf.frontend.trace import trace_step
from smp_tf.plan.graph import Graph

layers = keras.layers

TOKENS = 128  # in a sequence


@dataclasses.dataclass(frozen=True)
class Entry:
    """A model of the suite, and one microbatch of it.

    Attributes:
        build: makes the model; its variables stay without memory.
        inputs: arguments of the model.
        labels: shape of the classes, the shape of the logits without the last axis.
    """

    build: Callable[[], keras.Model]
    inputs: tuple[tf.TensorSpec, ...]
    labels: tuple[int, ...]

    def trace(self) -> Graph:
        """The graph of one step: forward, loss, gradients."""
        model = self.build()

        def forward_backward(labels: tf.Tensor, *inputs: tf.Tensor) -> Any:
            with tf.GradientTape() as tape:
                logits = tf.cast(model(*inputs, training=True), tf.float32)
                loss = tf.reduce_mean(
                    tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
                )
            return tape.gradient(loss, model.trainable_variables), loss

        labels = tf.TensorSpec(self.labels, tf.int32)
        return trace_step(
            forward_backward,
            [labels, *self.inputs],
            lambda function, tensors: function(*tensors),
        ).graph


def _image(batch: int, size: int) -> tuple[tf.TensorSpec, ...]:
    return (tf.TensorSpec([batch, size, size, 3], tf.float32),)


def _ids(batch: int, count: int = 1) -> tuple[tf.TensorSpec, ...]:
    return (tf.TensorSpec([batch, TOKENS], tf.int32),) * count


# --- models that others wrote ---------------------------------------------------------


class Application(smp.DistributedModel):
    def __init__(self, name: str, size: int) -> None:
        super().__init__(name="wrapped")
        self.inner = getattr(keras.applications, name)(
            weights=None, input_shape=(size, size, 3), classifier_activation=None
        )

    def call(self, images: tf.Tensor, training: bool = True) -> tf.Tensor:
        return self.inner(images, training=training)


def _application(name: str, size: int, batch: int = 8) -> Entry:
    return Entry(lambda: Application(name, size), _image(batch, size), (batch,))


class HuggingFace(smp.DistributedModel):
    def __init__(self, name: str, config: str, options: Mapping[str, Any]) -> None:
        import transformers

        super().__init__(name="wrapped")
        settings = getattr(transformers, config)(use_cache=False, **options)
        self.inner = getattr(transformers, name)(settings)

    def call(self, *ids: tf.Tensor, training: bool = True) -> tf.Tensor:
        names = ("input_ids", "decoder_input_ids")
        return self.inner(dict(zip(names, ids)), training=training).logits


def _hugging_face(
    name: str, config: str, batch: int = 4, num_inputs: int = 1, **options: Any
) -> Entry:
    return Entry(
        lambda: HuggingFace(name, config, options),
        _ids(batch, num_inputs),
        (batch, TOKENS),
    )


# --- models written here --------------------------------------------------------------


class UnevenMlp(smp.DistributedModel):
    """Widths differ by a factor of 64, so that weights differ by 4000."""

    def __init__(self) -> None:
        super().__init__(name="uneven_mlp")
        chance = random.Random(7)
        widths = [chance.choice([64, 128, 256, 512, 1024, 4096]) for _ in range(31)]
        self.dense = [layers.Dense(width, "relu") for width in widths]
        self.head = layers.Dense(1000)

    def call(self, x: tf.Tensor, training: bool = True) -> tf.Tensor:
        for layer in self.dense:
            x = layer(x)
        return self.head(x)


class UNet(smp.DistributedModel):
    """Ronneberger et al., arXiv 1505.04597, figure 1, with padding."""

    def __init__(self, levels: int = 4, width: int = 64) -> None:
        super().__init__(name="unet")
        widths = [width * 2**level for level in range(levels)]
        self.down = [self._pair(w) for w in widths]
        self.bottom = self._pair(2 * widths[-1])
        self.widen = [
            layers.Conv2DTranspose(w, 2, strides=2, padding="same") for w in widths
        ]
        self.up = [self._pair(w) for w in widths]
        self.pool = layers.MaxPooling2D()
        self.head = layers.Conv2D(21, 1)

    def _pair(self, width: int) -> list[keras.layers.Layer]:
        return [
            layers.Conv2D(width, 3, padding="same", activation="relu") for _ in "ab"
        ]

    def call(self, x: tf.Tensor, training: bool = True) -> tf.Tensor:
        skips = []
        for first, second in self.down:
            skips.append(second(first(x)))
            x = self.pool(skips[-1])
        for layer in self.bottom:
            x = layer(x)
        for (first, second), widen, skip in reversed(
            list(zip(self.up, self.widen, skips))
        ):
            x = second(first(tf.concat([skip, widen(x)], -1)))
        return self.head(x)


class TwoTower(smp.DistributedModel):
    """Queries against documents of the same batch; the towers differ in depth."""

    def __init__(self) -> None:
        super().__init__(name="two_tower")
        self.query = self._tower("query", 20_000, [1024] * 12)
        self.document = self._tower("document", 50_000, [2048] * 16)

    def _tower(self, name: str, rows: int, widths: list[int]) -> list[Any]:
        found: list[Any] = [layers.Embedding(rows, 128, name=f"{name}_embedding")]
        found += [
            layers.Dense(width, "relu", name=f"{name}_{i}")
            for i, width in enumerate(widths)
        ]
        return [*found, layers.Dense(256, name=f"{name}_out")]

    def call(
        self, query: tf.Tensor, document: tf.Tensor, training: bool = True
    ) -> tf.Tensor:
        ends = []
        for x, tower in ((query, self.query), (document, self.document)):
            x = tf.reduce_mean(tower[0](x), 1)
            for layer in tower[1:]:
                x = layer(x)
            ends.append(x)
        return tf.matmul(ends[0], ends[1], transpose_b=True)


class LstmStack(smp.DistributedModel):
    """A language model with as many recurrent layers as GNMT has in both halves."""

    def __init__(
        self, depth: int = 16, units: int = 1024, vocabulary: int = 8000
    ) -> None:
        super().__init__(name="lstm_stack")
        self.tokens = layers.Embedding(vocabulary, units)
        self.lstm = [
            layers.LSTM(units, return_sequences=True, name=f"lstm_{i}")
            for i in range(depth)
        ]
        self.head = layers.Dense(vocabulary)

    def call(self, ids: tf.Tensor, training: bool = True) -> tf.Tensor:
        x = self.tokens(ids)
        for layer in self.lstm:
            x = x + layer(x)
        return self.head(x)


class WideAndDeep(smp.DistributedModel):
    """Many wide tables that only meet in a deep head, and a linear path around it."""

    def __init__(self) -> None:
        super().__init__(name="wide_deep")
        rows = [1_000_000, 700_000, 500_000, 300_000, 200_000, 100_000, 50_000, 10_000]
        self.tables = [
            layers.Embedding(count, 64, name=f"table_{i}")
            for i, count in enumerate(rows)
        ]
        widths = [4096, 4096, 2048, 2048, 1024, 1024, 1024, 512, 512, 512, 256, 256]
        self.deep = [
            layers.Dense(width, "relu", name=f"deep_{i}")
            for i, width in enumerate(widths)
        ]
        self.wide = layers.Dense(2, name="wide")
        self.head = layers.Dense(2, name="head")

    def call(self, ids: tf.Tensor, training: bool = True) -> tf.Tensor:
        found = [table(ids[:, i]) for i, table in enumerate(self.tables)]
        x = joined = tf.concat(found, -1)
        for layer in self.deep:
            x = layer(x)
        return self.head(x) + self.wide(joined)


# --- the suite ------------------------------------------------------------------------

SUITE: Mapping[str, Entry] = {
    "uneven_mlp": Entry(UnevenMlp, (tf.TensorSpec([64, 1024], tf.float32),), (64,)),
    "gpt2_small": _hugging_face("TFGPT2LMHeadModel", "GPT2Config"),
    "gpt2_xl": _hugging_face(
        "TFGPT2LMHeadModel", "GPT2Config", batch=1, n_embd=1600, n_layer=48, n_head=25
    ),
    "bert_large": _hugging_face(
        "TFBertForMaskedLM",
        "BertConfig",
        hidden_size=1024,
        num_hidden_layers=24,
        num_attention_heads=16,
        intermediate_size=4096,
    ),
    "t5_base": _hugging_face(
        "TFT5ForConditionalGeneration",
        "T5Config",
        num_inputs=2,
        d_model=768,
        d_ff=3072,
        num_layers=12,
        num_heads=12,
    ),
    # ALBERT-xlarge, but with 4 blocks that are used 6 times each, so that there is
    # something to split.
    "albert": _hugging_face(
        "TFAlbertForMaskedLM",
        "AlbertConfig",
        hidden_size=2048,
        num_hidden_layers=24,
        num_hidden_groups=4,
        num_attention_heads=16,
        intermediate_size=8192,
    ),
    "resnet50": _application("ResNet50", 224),
    "densenet121": _application("DenseNet121", 224),
    "inceptionv3": _application("InceptionV3", 299),
    "unet": Entry(UNet, _image(2, 256), (2, 256, 256)),
    "two_tower": Entry(TwoTower, _ids(256, 2), (256,)),
    "lstm_stack": Entry(LstmStack, _ids(8), (8, TOKENS)),
    "wide_deep": Entry(WideAndDeep, _ids(512), (512,)),
}
