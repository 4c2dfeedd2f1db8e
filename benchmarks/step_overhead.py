"""What does cutting a step into segments cost: each call, and before the first one?

    python benchmarks/step_overhead.py

One process, one partition: a step over M microbatches runs as 2 M segment calls, a
forward and a backward for each microbatch.

Per call: the layers are so small that the calls are what is measured. From each step's
time the time of the same M microbatches in one plain `tf.function`, without any cut, is
subtracted; the rest is divided by the number of calls. The two take turns; the figures
are medians. The last column is the step with and without the recording of events, in
the same way.

Before the first call: a stack of transformer blocks, narrow, as the number of its
operations is what counts. `plan` traces the step for one microbatch, decides on the
plan and writes the step's function; the first call, in a `tf.function`, is what
TensorFlow takes to prepare it. A later call is subtracted from that one. Seconds of
CPU, of all threads: those of the clock depend on what else the host does.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any, Callable
from unittest import mock

import smp_tf as smp  # isort: skip  (first: it selects Keras 2)

import host
import tensorflow as tf
import tf_keras as keras

from smp_tf.runtime import emit

SEGMENTS = 2  # of one partition: forward and backward
LAYERS, WIDTH, EXAMPLES = 4, 4, 2  # EXAMPLES in each microbatch
MICROBATCHES = (4, 8, 16, 32, 64)

BLOCKS, HIDDEN, HEADS, SEQUENCE, VOCABULARY = 8, 16, 2, 8, 50
FEW, MANY = 4, 64  # microbatches of a first step


def dense_layers() -> list:
    return [
        keras.layers.Dense(WIDTH, use_bias=False, kernel_initializer="ones")
        for _ in range(LAYERS)
    ]


class Tiny(smp.DistributedModel):
    def __init__(self):
        super().__init__()
        self.stack = dense_layers()

    def call(self, inputs):
        for layer in self.stack:
            inputs = layer(inputs)
        return inputs


def cut_step(inputs: tf.Tensor) -> Callable:
    """The step as smp_tf runs it, with the microbatches of `smp.init`."""
    model = Tiny()

    @smp.step
    def forward_backward(inputs):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(inputs))
        return tape.gradient(loss, model.trainable_variables), loss

    assert len(forward_backward.plan(inputs).segments.segments) == SEGMENTS

    @tf.function
    def step(inputs):
        gradients, loss = forward_backward(inputs)
        return [gradient.accumulate() for gradient in gradients], loss.reduce_mean()

    return step


def uncut_step(num_microbatches: int) -> Callable:
    """The same operations in one function: no segment, no call, no schedule."""
    stack = dense_layers()
    for layer in stack:
        layer.build([None, WIDTH])
    variables = [layer.kernel for layer in stack]

    @tf.function
    def step(inputs):
        sums, losses = None, []
        for part in tf.split(inputs, num_microbatches):
            with tf.GradientTape() as tape:
                for layer in stack:
                    part = layer(part)
                loss = tf.reduce_mean(part)
            gradients = tape.gradient(loss, variables)
            sums = [a + b for a, b in zip(sums, gradients)] if sums else gradients
            losses.append(loss)
        return [s / num_microbatches for s in sums], tf.add_n(losses) / len(losses)

    return step


class Block(keras.layers.Layer):
    """A transformer block, in small operations."""

    def __init__(self):
        super().__init__()
        self.norms = [keras.layers.LayerNormalization() for _ in range(2)]
        self.mix = keras.layers.MultiHeadAttention(HEADS, HIDDEN // HEADS)
        self.wide = keras.layers.Dense(4 * HIDDEN, activation="gelu")
        self.narrow = keras.layers.Dense(HIDDEN)

    def call(self, inputs):
        normed = self.norms[0](inputs)
        inputs += self.mix(normed, normed, use_causal_mask=True)
        return inputs + self.narrow(self.wide(self.norms[1](inputs)))


class Gpt(smp.DistributedModel):
    def __init__(self):
        super().__init__()
        self.embed = keras.layers.Embedding(VOCABULARY, HIDDEN)
        self.blocks = [Block() for _ in range(BLOCKS)]
        self.head = keras.layers.Dense(VOCABULARY)

    def call(self, ids):
        hidden = self.embed(ids)
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden)


def unrecorded() -> Any:
    """A context: steps that are built in it leave no events."""
    return mock.patch.object(emit._Emitter, "_recorded", lambda self: {})


def measure(num_microbatches: int, repeats: int) -> tuple[float, ...]:
    """Median seconds of a step: cut, uncut, cut but not recorded."""
    smp.init({"microbatches": num_microbatches})
    inputs = tf.ones([num_microbatches * EXAMPLES, WIDTH])
    steps = [cut_step(inputs), uncut_step(num_microbatches)]
    with unrecorded():
        steps.append(cut_step(inputs))
        results = [step(inputs) for step in steps]  # traces
    for result in results[1:]:
        tf.nest.map_structure(tf.debugging.assert_near, results[0], result)
    samples: list[list[float]] = [[] for _ in steps]
    for _ in range(repeats):
        for step, seconds in zip(steps, samples):
            start = time.perf_counter()
            _, loss = step(inputs)
            loss.numpy()
            seconds.append(time.perf_counter() - start)
    smp.shutdown()
    return tuple(statistics.median(seconds) for seconds in samples)


def measure_first(num_microbatches: int) -> tuple[float, float, float]:
    """Seconds of CPU: of `plan`, of the first call and of a later one."""
    smp.init({"microbatches": num_microbatches})
    model = Gpt()
    ids = tf.zeros([num_microbatches, SEQUENCE], tf.int32)

    @smp.step
    def forward_backward(ids):
        with tf.GradientTape() as tape:
            logits = model(ids)
            loss = tf.reduce_mean(
                tf.nn.sparse_softmax_cross_entropy_with_logits(ids, logits)
            )
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def step(ids):
        gradients, loss = forward_backward(ids)
        return [gradient.accumulate() for gradient in gradients], loss.reduce_mean()

    times = [time.process_time()]
    forward_backward.plan(ids)
    times.append(time.process_time())
    for _ in range(4):
        step(ids)[1].numpy()
        times.append(time.process_time())
    smp.shutdown()
    plan, first, *later = (end - start for start, end in zip(times, times[1:]))
    return plan, first, min(later)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    print(host.describe())
    print(f"{options.repeats} repeats, medians; {SEGMENTS} segments")
    print(
        f"{'M':>4} {'step us':>10} {'uncut us':>10} {'us per segment call':>20}"
        f" {'recording %':>12}"
    )
    per_call = 0.0
    for num_microbatches in MICROBATCHES:
        cut, uncut, plain = measure(num_microbatches, options.repeats)
        per_call = (cut - uncut) / (SEGMENTS * num_microbatches) * 1e6
        print(
            f"{num_microbatches:>4} {cut * 1e6:>10.0f} {uncut * 1e6:>10.0f}"
            f" {per_call:>20.1f} {(cut / plain - 1) * 100:>12.1f}",
            flush=True,
        )
    print(f"first step of {BLOCKS} transformer blocks, seconds of CPU")
    print(f"{'M':>4} {'plan':>10} {'first call':>10} {'later call':>10} {'first':>10}")
    measure_first(FEW)  # what a process does once
    first_step: dict[int, float] = {}
    for num_microbatches in (FEW, MANY):
        plan, first, later = measure_first(num_microbatches)
        first_step[num_microbatches] = plan + first - later
        print(
            f"{num_microbatches:>4} {plan:>10.2f} {first:>10.2f} {later:>10.3f}"
            f" {first_step[num_microbatches]:>10.2f}",
            flush=True,
        )
    ratio = first_step[MANY] / first_step[FEW]
    print(
        f"us_per_segment_call={per_call:.1f}"
        f" first_step_m{MANY}_over_m{FEW}={ratio:.2f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
