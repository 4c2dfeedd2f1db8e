"""Does communication hide behind computation?

    python benchmarks/link_delay.py

Two ranks, each pinned to one core, train a stack of transformer blocks at M = 16 over a
link that is 0 and 20 ms slow, by turns in launches of their own: kernels built for
tests keep every message back for so long (kernels/tests/slow_link.cc). The ranks
measure the link with the profile, and plan for it: the same blocks on each rank, and as
many microbatches on the way as hide the delay, within `active_microbatches`.

A step is timed from its start to that of the next one. The last line: how much longer
it takes in the medians of all launches, by schedule.
"""

from __future__ import annotations

import argparse
import itertools
import os
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import host

sys.path.insert(0, str(host.ROOT))

MILLISECONDS = (0.0, 20.0)
SCHEDULES = ("interleaved", "zero_bubble")
MICROBATCHES, STEPS = 16, 8
BLOCKS, DIM, LENGTH, ROWS = 8, 256, 128, 4  # ROWS in each microbatch


def launch(
    schedule: str, library: str, partition: str, milliseconds: float
) -> tuple[float, int]:
    """Median seconds of a step in a launch of its own; microbatches that ranks keep."""
    from tests import slow_link

    late = slow_link.delay(milliseconds)
    output = host.launch_ranks(2, __file__, schedule, library, partition, env=late)
    found = re.search(r"median=([\d.]+) kept=(\d+)", output)
    if found is None:
        sys.exit(f"no rank reported\n{output}")
    return float(found[1]), int(found[2])


def run_rank(schedule: str, library: str, partition: str) -> None:
    """Train; the partition is followed, or written if there is none yet."""
    host.pin_rank()
    os.environ.update(TF_NUM_INTRAOP_THREADS="1", TF_NUM_INTEROP_THREADS="1")

    import smp_tf as smp  # isort: skip  (first: it selects Keras 2)

    import tensorflow as tf
    from blocks import stack

    from tests import slow_link

    slow_link.use(Path(library))
    is_planned = Path(partition).exists()
    given = {"profile": True, "partition_file": partition} if is_planned else {}
    smp.init(
        {
            "microbatches": MICROBATCHES,
            "pipeline": schedule,
            "optimize": "speed",
            "memory_weight": 0.0,
            **given,
        }
    )

    model = stack(smp.DistributedModel, BLOCKS, DIM, heads=4)

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
    plan = forward_backward.plan(x)
    starts = []
    for _ in range(STEPS if is_planned else 0):
        starts.append(time.perf_counter())
        _, loss = step(x)
        loss.numpy()
    seconds = [after - before for before, after in itertools.pairwise(starts)]
    if smp.rank() == 0 and is_planned:
        kept = max(plan.report.peak_live)
        print(f"median={statistics.median(seconds[2:]):.4f} kept={kept}", flush=True)
    elif smp.rank() == 0:
        plan.save(partition)
    smp.shutdown()


def compare(
    library: str, partition: str, launches: int
) -> dict[tuple[str, float], list[float]]:
    """(schedule, milliseconds) -> seconds of a step in each launch."""
    host.launch_ranks(2, __file__, SCHEDULES[0], library, partition)
    seconds: dict[tuple[str, float], list[float]] = {}
    for _ in range(launches):
        for schedule in SCHEDULES:
            row = []
            for milliseconds in MILLISECONDS:
                took, kept = launch(schedule, library, partition, milliseconds)
                seconds.setdefault((schedule, milliseconds), []).append(took)
                row.append(f"{f'{took:.3f} ({kept})':>17}")
            print(f"{schedule:>12}  " + "  ".join(row), flush=True)
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--launches", type=int, default=2)
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(*options.rank)
        return

    from tests import slow_link

    library = str(slow_link.build())
    print(host.describe())
    print(f"M = {MICROBATCHES}, {STEPS - 3} steps in a launch; seconds of a step")
    names = [f"{milliseconds:.0f} ms late (kept)" for milliseconds in MILLISECONDS]
    print(f"{'schedule':>12}  " + "  ".join(names))
    with tempfile.TemporaryDirectory() as directory:
        seconds = compare(library, f"{directory}/partition.json", options.launches)
    growth = {
        schedule: statistics.median(seconds[schedule, MILLISECONDS[1]])
        / statistics.median(seconds[schedule, MILLISECONDS[0]])
        - 1
        for schedule in SCHEDULES
    }
    print(" ".join(f"{name}_growth={value:.3f}" for name, value in growth.items()))


if __name__ == "__main__":
    main()
