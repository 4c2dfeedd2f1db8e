"""What does cutting a step into segments cost per segment call?

    python benchmarks/step_overhead.py

One process, one partition: a step over M microbatches runs as 2 M segment calls, a
forward and a backward for each microbatch. The layers are so small that the calls are
what is measured. From each step's time the time of the same M microbatches in one
plain `tf.function`, without any cut, is subtracted; the rest is divided by the number
of calls. The two take turns; the figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Callable

import smp_tf as smp  # isort: skip  (first: it selects Keras 2)

import host
import tensorflow as tf
import tf_keras as keras

SEGMENTS = 2  # of one partition: forward and backward
LAYERS, WIDTH, EXAMPLES = 4, 4, 2  # EXAMPLES in each microbatch
MICROBATCHES = (8, 16, 32)


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


def measure(num_microbatches: int, repeats: int) -> tuple[float, float]:
    """Median seconds of a step, cut and uncut."""
    smp.init({"microbatches": num_microbatches})
    inputs = tf.ones([num_microbatches * EXAMPLES, WIDTH])
    steps = [cut_step(inputs), uncut_step(num_microbatches)]
    results = [step(inputs) for step in steps]  # traces
    tf.nest.map_structure(tf.debugging.assert_near, *results)
    samples: list[list[float]] = [[], []]
    for _ in range(repeats):
        for step, seconds in zip(steps, samples):
            start = time.perf_counter()
            _, loss = step(inputs)
            loss.numpy()
            seconds.append(time.perf_counter() - start)
    smp.shutdown()
    cut, uncut = (statistics.median(seconds) for seconds in samples)
    return cut, uncut


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=300)
    options = parser.parse_args()
    print(host.describe())
    print(f"{options.repeats} repeats, medians; {SEGMENTS} segments")
    print(f"{'M':>4} {'step us':>10} {'uncut us':>10} {'us per segment call':>20}")
    per_call = 0.0
    for num_microbatches in MICROBATCHES:
        cut, uncut = measure(num_microbatches, options.repeats)
        per_call = (cut - uncut) / (SEGMENTS * num_microbatches) * 1e6
        print(
            f"{num_microbatches:>4} {cut * 1e6:>10.0f} {uncut * 1e6:>10.0f} "
            f"{per_call:>20.1f}",
            flush=True,
        )
    print(f"us_per_segment_call={per_call:.1f}", flush=True)


if __name__ == "__main__":
    main()
