"""Train a small GPT on the source of Python's standard library, one byte per token.

    horovodrun -np 2 python -m smp_tf.examples.char_gpt
    python -m smp_tf.examples.char_gpt                   (one process, no launcher)

The input and the output embedding are one variable ("tied"): the first and the last
operations of the model share it, so the pipeline visits its partition twice.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
import time
from pathlib import Path
from typing import Any

import smp_tf as smp  # isort: skip  (first: it selects Keras 2)

import numpy as np
import tensorflow as tf
import tf_keras as keras

from smp_tf.examples.progress import Progress

VOCABULARY = 128  # ASCII; any other byte becomes "?"
TEXT_BYTES = 600_000
HELD_OUT_BYTES = 60_000  # the end of the text is never trained on


class CausalSelfAttention(keras.layers.Layer):
    """Every position attends to itself and what is before it; [batch, length, dim]."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim = num_heads, dim // num_heads
        self.qkv = keras.layers.Dense(3 * dim)
        self.out = keras.layers.Dense(dim)

    def call(self, hidden: tf.Tensor) -> tf.Tensor:
        length = hidden.shape[1]
        heads = [-1, length, 3 * self.num_heads, self.head_dim]
        qkv = tf.transpose(tf.reshape(self.qkv(hidden), heads), [0, 2, 1, 3])
        query, key, value = tf.split(qkv, 3, axis=1)
        scores = tf.matmul(query, key, transpose_b=True) / math.sqrt(self.head_dim)
        future = np.triu(np.full([length, length], -1e9, np.float32), k=1)
        mixed = tf.matmul(tf.nn.softmax(scores + future), value)
        dim = self.num_heads * self.head_dim
        return self.out(
            tf.reshape(tf.transpose(mixed, [0, 2, 1, 3]), [-1, length, dim])
        )


class Block(keras.layers.Layer):
    """Attention and a two-layer network, each behind a LayerNorm and a residual sum."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = keras.layers.LayerNormalization(epsilon=1e-5)
        self.attention = CausalSelfAttention(dim, num_heads)
        self.norm2 = keras.layers.LayerNormalization(epsilon=1e-5)
        self.dense1 = keras.layers.Dense(4 * dim, activation="gelu")
        self.dense2 = keras.layers.Dense(dim)

    def call(self, hidden: tf.Tensor) -> tf.Tensor:
        hidden += self.attention(self.norm1(hidden))
        return hidden + self.dense2(self.dense1(self.norm2(hidden)))


class CharGPT(smp.DistributedModel):
    """Decoder-only transformer; int32 bytes [batch, length] to logits over bytes."""

    def __init__(
        self, length: int, dim: int, num_blocks: int, num_heads: int
    ) -> None:
        super().__init__()
        start = keras.initializers.RandomNormal(stddev=0.02, seed=1)
        layers = keras.layers
        self.token = layers.Embedding(VOCABULARY, dim, embeddings_initializer=start)
        self.position = layers.Embedding(length, dim, embeddings_initializer=start)
        self.blocks = [Block(dim, num_heads) for _ in range(num_blocks)]
        self.norm = layers.LayerNormalization(epsilon=1e-5)

    def call(self, tokens: tf.Tensor) -> tf.Tensor:
        hidden = self.token(tokens) + self.position(tf.range(tokens.shape[1]))
        for block in self.blocks:
            hidden = block(hidden)
        return tf.matmul(self.norm(hidden), self.token.embeddings, transpose_b=True)


def training_step(model: CharGPT) -> Any:
    """The step of a model: bytes [batch, length + 1] to gradients and loss."""
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    @smp.step
    def forward_backward(tokens):
        with tf.GradientTape() as tape:
            loss = loss_function(tokens[:, 1:], model(tokens[:, :-1]))
        return tape.gradient(loss, model.trainable_variables), loss

    return forward_backward


def build(batch: int) -> tuple[Any, np.ndarray]:
    """For ``python -m smp_tf plan``: the step and one batch, at the default sizes."""
    options = parse_arguments([])
    model = CharGPT(options.length, options.dim, options.blocks, options.heads)
    return training_step(model), np.zeros([batch, options.length + 1], np.int32)


def load_text() -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the standard library's top-level modules: to train on, held out."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py"))
    text = b"".join(file.read_bytes() for file in files)[:TEXT_BYTES]
    tokens = np.frombuffer(text, np.uint8).astype(np.int32)
    tokens = np.where(tokens < VOCABULARY, tokens, ord("?"))
    return tokens[:-HELD_OUT_BYTES], tokens[-HELD_OUT_BYTES:]


def windows(tokens: np.ndarray, starts: np.ndarray, length: int) -> np.ndarray:
    """The windows [len(starts), length + 1]: inputs and, shifted by one, targets."""
    return tokens[starts[:, np.newaxis] + np.arange(length + 1)]


def parse_arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument(
        "--pipeline", default="interleaved", help="simple, zero_bubble or auto"
    )
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=32, help="windows per step")
    parser.add_argument("--length", type=int, default=64, help="bytes per window")
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--heads", type=int, default=4)
    return parser.parse_args(given)


def main() -> None:
    options = parse_arguments()
    smp.init({"microbatches": options.microbatches, "pipeline": options.pipeline})
    keras.utils.set_random_seed(1)

    text, held_out = load_text()
    model = CharGPT(options.length, options.dim, options.blocks, options.heads)
    rate = keras.optimizers.schedules.CosineDecay(
        0.0, options.steps, warmup_target=3e-3, warmup_steps=options.steps // 10
    )
    optimizer = keras.optimizers.Adam(rate, beta_2=0.98)
    loss_function = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    forward_backward = training_step(model)

    @tf.function
    def train_step(tokens):
        gradients, loss = forward_backward(tokens)
        gradients = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss.reduce_mean()

    @smp.step
    def forward(tokens):
        return loss_function(tokens[:, 1:], model(tokens[:, :-1]))

    @tf.function
    def evaluate(tokens):
        return forward(tokens).reduce_mean()

    started = time.monotonic()
    last_start = len(text) - options.length
    generator = np.random.default_rng(0)  # the same windows on every rank
    starts = np.zeros(options.batch, np.int64)
    plan = forward_backward.plan(windows(text, starts, options.length))
    if smp.rank() == 0:
        print(smp.partition_table(plan), flush=True)

    lines = 10  # of progress, so that the loss can be seen falling
    for line in range(lines):
        steps = options.steps // lines
        progress = Progress(
            f"step {(line + 1) * steps}", steps, visible=smp.rank() == 0
        )
        total = 0.0
        for step in range(1, steps + 1):
            starts = generator.integers(0, last_start, options.batch)
            tokens = tf.constant(windows(text, starts, options.length))
            total += float(train_step(tokens))
            progress.update(step, f"loss {total / step:.3f}")
    seconds = time.monotonic() - started

    starts = np.arange(0, len(held_out) - options.length, options.length)
    whole = len(starts) // options.batch * options.batch
    losses = [
        float(evaluate(tf.constant(windows(held_out, some, options.length))))
        for some in np.split(starts[:whole], whole // options.batch)
    ]
    loss = float(np.mean(losses))
    if smp.rank() == 0:
        print(
            f"loss={loss:.4f} bits_per_char={loss / math.log(2):.3f} "
            f"ranks={smp.size()} microbatches={options.microbatches} "
            f"schedule={options.pipeline} seconds={seconds:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
