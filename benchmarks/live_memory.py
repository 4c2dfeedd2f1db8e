"""Does the memory of a step grow with the number of microbatches?

    python benchmarks/live_memory.py

A stack of transformer blocks on two ranks, each pinned to one core, every launch with
another schedule or number of microbatches of the same size. Of each rank: the most
microbatches in flight (the checker's figure), what the plan says of its activations,
and resident memory at its peak less that after building the step, once with sequences
of 256 and once of 8: what the second takes is the graph of M microbatches, and the rest
of the first is what they keep. `interleaved` keeps p, p - 1, .. microbatches on rank 0,
1, .. of p, however many there are.

The last line: the worst rank's growth from the first M to the last one, and that with
`simple` from the first M to four times as many, for comparison.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import host

MB = 2**20
RANKS = 2
MICROBATCHES = (8, 32, 128)
COMPARED = (("simple", 8), ("simple", 32), ("zero_bubble", 8), ("zero_bubble", 128))
BLOCKS, DIM, LENGTH, ROWS = 6, 128, 256, 8  # ROWS in each microbatch
SHORT = 8  # in place of LENGTH, to see what else takes memory
COLUMNS = (("live", 1), ("planned", MB), ("measured", MB), ("graph", MB), ("kept", MB))


def launch(pipeline: str, microbatches: int, length: int) -> list[dict[str, Any]]:
    """What every rank reports of one launch."""
    arguments = pipeline, str(microbatches), str(length)
    output = host.launch_ranks(RANKS, __file__, *arguments)
    for line in output.splitlines():
        _, found, text = line.partition("ranks=")
        if found:
            return list(json.loads(text))
    sys.exit(f"no rank reported\n{output}")


def resident(name: str) -> int:
    """A figure of /proc/self/status: VmRSS, or VmHWM for the peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def run_rank(pipeline: str, microbatches: int, length: int) -> None:
    host.pin_rank()

    import smp_tf as smp  # isort: skip  (first: it selects Keras 2)

    import tensorflow as tf
    from blocks import stack

    from smp_tf.plan.memory import memory_by_rank

    smp.init({"microbatches": microbatches, "pipeline": pipeline})

    model = stack(smp.DistributedModel, BLOCKS, DIM, heads=4)

    @smp.step
    def forward_backward(rows: Any) -> Any:
        inputs = tf.random.stateless_normal([ROWS, length, DIM], [1, 2]) + rows
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(inputs)))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def step(rows: Any) -> Any:
        gradients, loss = forward_backward(rows)
        return [gradient.accumulate() for gradient in gradients], loss.reduce_mean()

    # One number for each example, so that the batch itself takes no memory.
    rows = tf.ones([microbatches * ROWS, 1, 1])
    plan = forward_backward.plan(rows)
    before = resident("VmRSS")
    for _ in range(2):
        _, loss = step(rows)
        loss.numpy()
    mine = {
        "live": plan.report.peak_live[smp.pp_rank()],
        "planned": memory_by_rank(plan)[smp.pp_rank()].activations,
        "measured": resident("VmHWM") - before,
    }
    everyone = smp.allgather(mine, smp.WORLD)
    if smp.rank() == 0:
        print(f"ranks={json.dumps(everyone)}", flush=True)
    smp.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(options.rank[0], *map(int, options.rank[1:]))
        return
    print(host.describe())
    print(f"{RANKS} ranks, {ROWS} x {LENGTH} x {DIM} in a microbatch, {BLOCKS} blocks")
    names = "planned MB     peak MB    graph MB     kept MB"
    print(f"{'schedule':>12} {'M':>4}   in flight  {names}")
    measured: dict[tuple[str, int], list[int]] = {}
    for pipeline, count in (*(("interleaved", m) for m in MICROBATCHES), *COMPARED):
        ranks = launch(pipeline, count, LENGTH)
        for rank, short in zip(ranks, launch(pipeline, count, SHORT), strict=True):
            rank["graph"] = short["measured"]
            rank["kept"] = rank["measured"] - short["measured"]
        measured[pipeline, count] = [each["kept"] for each in ranks]
        cells = [
            " ".join(f"{each[key] / unit:5.0f}" for each in ranks)
            for key, unit in COLUMNS
        ]
        print(f"{pipeline:>12} {count:>4} " + "  ".join(cells), flush=True)

    def growth(first: tuple[str, int], last: tuple[str, int]) -> float:
        pairs = zip(measured[first], measured[last], strict=True)
        return max(b / a for a, b in pairs)

    fewest, most = MICROBATCHES[0], MICROBATCHES[-1]
    print(
        f"interleaved_m{most}_over_m{fewest}="
        f"{growth(('interleaved', fewest), ('interleaved', most)):.2f}"
        f" zero_bubble_m128_over_m8="
        f"{growth(('zero_bubble', 8), ('zero_bubble', 128)):.2f}"
        f" simple_m32_over_m8={growth(('simple', 8), ('simple', 32)):.2f}"
    )


if __name__ == "__main__":
    main()
