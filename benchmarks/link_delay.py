"""Does communication hide behind computation?

    python benchmarks/link_delay.py

Two ranks, each pinned to one core, train a stack of transformer blocks at M = 16 over a
link that is 0 and 20 ms slow, by turns in launches of their own: kernels built for
tests keep every message back for so long (kernels/tests/slow_link.cc). `interleaved`
keeps no more microbatches than ranks, too few to hide 20 ms each way on a stage of
65 ms; `zero_bubble` may keep p + 2.

The last line: how much longer a step takes in the medians of all launches, by schedule.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import host

sys.path.insert(0, str(host.ROOT))

MILLISECONDS = (0.0, 20.0)
SCHEDULES = ("interleaved", "zero_bubble")
MICROBATCHES, STEPS = 16, 8
BLOCKS, DIM, LENGTH, ROWS = 8, 256, 128, 4  # ROWS in each microbatch


def launch(schedule: str, library: str, milliseconds: float) -> float:
    """Median seconds of a step in a launch of its own."""
    from tests import slow_link

    late = slow_link.delay(milliseconds)
    output = host.launch_ranks(2, __file__, schedule, library, env=late)
    found = re.search(r"median=([\d.]+)", output)
    if found is None:
        sys.exit(f"no rank reported\n{output}")
    return float(found[1])


def run_rank(schedule: str, library: str) -> None:
    host.pin_rank()
    os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1")

    import smp_tf as smp  # isort: skip  (first: it selects Keras 2)

    import tensorflow as tf

    from smp_tf.examples.char_gpt import Block
    from tests import slow_link

    slow_link.use(Path(library))
    smp.init(
        {
            "microbatches": MICROBATCHES,
            "pipeline": schedule,
            "optimize": "speed",
            "memory_weight": 0.0,
        }
    )

    class Blocks(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [Block(DIM, 4) for _ in range(BLOCKS)]

        def call(self, x: Any) -> Any:
            for block in self.blocks:
                x = block(x)
            return x

    model = Blocks()

    @smp.step
    def forward_backward(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x)))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def step(x: Any) -> Any:
        gradients, loss = forward_backward(x)
        return [gradient.accumulate() for gradient in gradients], loss.reduce_mean()

    x = tf.random.stateless_normal([MICROBATCHES * ROWS, LENGTH, DIM], [1, 2])
    seconds = []
    for _ in range(STEPS):
        smp.barrier()
        start = time.perf_counter()
        _, loss = step(x)
        loss.numpy()
        smp.barrier()
        seconds.append(time.perf_counter() - start)
    if smp.rank() == 0:
        print(f"median={statistics.median(seconds[2:]):.4f}", flush=True)
    smp.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--launches", type=int, default=2)
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(*options.rank)
        return

    from tests import slow_link

    library = str(slow_link.build())
    print(host.describe())
    print(f"M = {MICROBATCHES}, {STEPS - 2} steps in a launch; seconds of a step")
    names = [f"{milliseconds:.0f} ms late" for milliseconds in MILLISECONDS]
    print(f"{'schedule':>12}  " + "  ".join(names))
    seconds: dict[tuple[str, float], list[float]] = {}
    for _ in range(options.launches):
        for schedule in SCHEDULES:
            for milliseconds in MILLISECONDS:
                took = launch(schedule, library, milliseconds)
                seconds.setdefault((schedule, milliseconds), []).append(took)
            row = (f"{seconds[schedule, each][-1]:10.3f}" for each in MILLISECONDS)
            print(f"{schedule:>12}  " + "  ".join(row), flush=True)
    growth = {
        schedule: statistics.median(seconds[schedule, MILLISECONDS[1]])
        / statistics.median(seconds[schedule, MILLISECONDS[0]])
        - 1
        for schedule in SCHEDULES
    }
    print(" ".join(f"{name}_growth={value:.3f}" for name, value in growth.items()))


if __name__ == "__main__":
    main()
