"""How much memory does each rank of a large model take?

    python benchmarks/memory.py

Trains a model of 1.2 GB of weights for three steps with Adam, split over 2 and over 4
processes that `horovodrun` starts, each pinned to one core. Of each rank: its share
(the weights it owns, their gradients and Adam's two slots: four times the weights), and
its peak resident memory from the start of the process, imports included. A rank may
take 1.15 times its share and 700 MB; the last line is the worst rank's peak over that
limit, which must not exceed 1.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

import host

MB = 2**20
PARTITIONS = (2, 4)
WIDTH, HIDDEN, BLOCKS = 1024, 4096, 37  # 8.4 million parameters in a block
BATCH, LENGTH, MICROBATCHES, STEPS = 8, 8, 4, 3
COPIES = 4  # weight, gradient, Adam's m and v
FACTOR, FIXED = 1.15, 700 * MB


def launch(size: int) -> float:
    """Run this file on `size` ranks, show their output; the worst peak over limit."""
    command = [str(Path(sys.executable).parent / "horovodrun"), "--gloo"]
    command += ["-np", str(size)]
    command += [sys.executable, str(Path(__file__).resolve()), "--rank"]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command,
        env={**quiet, **os.environ},
        cwd=host.ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    worst = 0.0
    assert process.stdout is not None
    for line in process.stdout:
        text = re.sub(r"^\[\d+\]<stdout>:", "", line)
        found = re.match(r"worst=([\d.]+)$", text)
        if found:
            worst = float(found[1])
        else:
            print(text, end="", flush=True)
    if process.wait() or not worst:
        sys.exit(process.returncode or "no rank reported")
    return worst


def peak_bytes() -> int:
    """The most resident memory this process has had."""
    status = Path("/proc/self/status").read_text()
    found = re.search(r"VmHWM:\s+(\d+) kB", status)
    assert found is not None
    return int(found[1]) * 1024


def train() -> list[tuple[str, int]]:
    """[(what has been done, peak memory by then)]; the last entry is weight bytes."""
    import tensorflow as tf

    import smp_tf as smp

    layers = tf.keras.layers

    class Big(smp.DistributedModel):
        def __init__(self):
            super().__init__(name="big")
            self.blocks = [
                (layers.LayerNormalization(), layers.Dense(HIDDEN, "relu"))
                + (layers.Dense(WIDTH),)
                for _ in range(BLOCKS)
            ]

        def call(self, inputs):
            for norm, up, down in self.blocks:
                inputs = inputs + down(up(norm(inputs)))
            return inputs

    peaks = [("started", peak_bytes())]
    tf.keras.utils.set_random_seed(1)
    model, optimizer = Big(), tf.keras.optimizers.Adam(1e-4)
    inputs = tf.random.normal([BATCH, LENGTH, WIDTH])

    @smp.step
    def forward_backward(inputs):
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(inputs)))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(inputs):
        gradients, loss = forward_backward(inputs)
        gradients = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss.reduce_mean()

    forward_backward.plan(inputs)
    peaks.append(("built", peak_bytes()))
    for step in range(STEPS):
        train_step(inputs).numpy()
        peaks.append((f"step {step + 1}", peak_bytes()))
    weights = sum(v.shape.num_elements() * v.dtype.size for v in model.variables)
    return peaks + [("weights", weights)]


def run_rank() -> None:
    host.pin_rank()

    import smp_tf as smp

    size = int(os.environ["HOROVOD_SIZE"])
    smp.init({"partitions": size, "microbatches": MICROBATCHES})
    everyone = smp.allgather(train(), smp.WORLD)
    if smp.rank() == 0:
        report(everyone)
    smp.barrier()
    smp.shutdown()


def report(everyone: list[list[tuple[str, int]]]) -> None:
    if len(everyone) == PARTITIONS[0]:
        print(host.describe())
    total = sum(rows[-1][1] for rows in everyone)
    print(
        f"{len(everyone)} ranks, one core each; weights {total / MB:.0f} MB; MB by the"
        " end of each phase, then the rank's share, its limit, and peak over limit"
    )
    names = [name for name, _ in everyone[0][:-1]]
    print("rank " + "".join(f"{name:>9}" for name in [*names, "share", "limit", ""]))
    worst = 0.0
    for rank, rows in enumerate(everyone):
        peaks, share = [value for _, value in rows[:-1]], COPIES * rows[-1][1]
        limit = FACTOR * share + FIXED
        worst = max(worst, peaks[-1] / limit)
        cells = [f"{value / MB:9.0f}" for value in [*peaks, share, limit]]
        print(f"{rank:<5}" + "".join(cells) + f"{peaks[-1] / limit:9.2f}")
    print(f"worst={worst:.3f}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    if parser.parse_args().rank:
        run_rank()
        return 0
    worst = {size: launch(size) for size in PARTITIONS}
    by_size = " ".join(f"partitions{size}={value:.2f}" for size, value in worst.items())
    print(f"{by_size} rank_peak_over_share={max(worst.values()):.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
