"""What does it cost to combine a pipeline with data parallelism?

    python benchmarks/hybrid.py

Four ranks, two on each of two cores, train the same stack of transformer blocks with
Adam on the same 16 examples a step, by turns in launches of their own:

    pipeline    one replica of four partitions
    horovod     four replicas of one partition, averaged by smp.DistributedOptimizer
    hybrid      two replicas of two partitions
    sharded     as hybrid, each optimizer slot on one rank of the dp_group

Where there are replicas, two kinds of step take turns in each launch: one averages each
gradient as soon as it is there, the other all of them after the pipeline. The last line
has, in the medians of all launches of `hybrid`, how much longer the second takes, and
the fullest rank's bytes of slots in `sharded` against `hybrid`.

The gradients of a rank fill several buckets, the threads are those that smp.init gives.
Ranks that share a core keep it busy, and adding up takes its time as well; so on one
host an early average can be hidden as far as ranks wait, and no further.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import host

RANKS, EXAMPLES, ROWS = 4, 16, 2  # ROWS of the EXAMPLES in each microbatch
BLOCKS, DIM, LENGTH = 4, 512, 32  # 12 MB of weights in each block
STEPS, WARM_UP = 10, 2
MODES: dict[str, dict[str, Any]] = {
    "pipeline": {"partitions": 4},
    "horovod": {"partitions": 1, "horovod": True},
    "hybrid": {"partitions": 2, "horovod": True},
    "sharded": {"partitions": 2, "horovod": True, "shard_optimizer_state": True},
}


def launch(mode: str) -> dict[str, Any]:
    """What rank 0 reports of one launch."""
    output = host.launch_ranks(RANKS, __file__, mode)
    for line in output.splitlines():
        _, found, text = line.partition("report=")
        if found:
            return dict(json.loads(text))
    sys.exit(f"no rank reported\n{output}")


def run_rank(mode: str) -> None:
    host.pin_rank()

    import smp_tf as smp  # isort: skip  (first: it selects Keras 2)

    import tensorflow as tf
    from blocks import stack

    from smp_tf.frontend.hooks import optimizer_slots

    config = MODES[mode]
    replicas = RANKS // config["partitions"]
    microbatches = EXAMPLES // replicas // ROWS
    smp.init({"microbatches": microbatches, "optimize": "speed", **config})
    tf.keras.utils.set_random_seed(1)

    model = stack(smp.DistributedModel, BLOCKS, DIM, heads=4)
    optimizer = smp.DistributedOptimizer(tf.keras.optimizers.Adam(1e-3))

    @smp.step
    def forward_backward(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x)))
        return tape.gradient(loss, model.trainable_variables), loss

    def make_step(is_late: bool) -> Callable[[Any], Any]:
        @tf.function
        def step(x: Any) -> Any:
            gradients, losses = forward_backward(x)
            gradients = [gradient.accumulate() for gradient in gradients]
            loss = losses.reduce_mean()  # there when the pipeline is over
            if is_late:
                with tf.control_dependencies([loss]):
                    gradients = [tf.identity(each) for each in gradients]
            optimizer.apply_gradients(zip(gradients, model.trainable_variables))
            return loss

        return step

    x = tf.random.stateless_normal([EXAMPLES, LENGTH, DIM], [1, 2])
    x = x[smp.dp_rank() :: replicas]
    steps = {"overlapped": make_step(False), "after": make_step(True)}
    if replicas == 1:
        del steps["after"]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UP + STEPS):
        for name, step in steps.items():
            smp.barrier()
            begin = time.perf_counter()
            step(x).numpy()
            smp.barrier()
            seconds[name].append(time.perf_counter() - begin)
    every = optimizer_slots.every_slot(optimizer)
    slots = sum(slot.shape.num_elements() * slot.dtype.size for slot in every)
    slots = max(smp.allgather(slots, smp.WORLD))
    if smp.rank() == 0:
        report = {"slots": slots}
        for name, each in seconds.items():
            report[name] = statistics.median(each[WARM_UP:])
        print(f"report={json.dumps(report)}", flush=True)
    smp.shutdown()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--launches", type=int, default=3)
    parser.add_argument("--rank", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank:
        run_rank(options.rank)
        return

    print(host.describe())
    print(f"{BLOCKS} blocks, dim {DIM}, sequence {LENGTH}, {EXAMPLES} examples a step")
    print(f"{'mode':>9} {'overlapped ms':>14} {'after ms':>9} {'slots MB':>9}")
    found: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for _ in range(options.launches):
        for mode in MODES:
            report = launch(mode)
            found[mode].append(report)
            after = f"{1e3 * report['after']:.0f}" if "after" in report else "-"
            print(
                f"{mode:>9} {1e3 * report['overlapped']:>14.0f} {after:>9}"
                f" {report['slots'] / 2**20:>9.1f}",
                flush=True,
            )

    def median(mode: str, name: str) -> float:
        return statistics.median(each[name] for each in found[mode])

    hybrid = median("hybrid", "overlapped")
    share = median("sharded", "slots") / median("hybrid", "slots")
    print(
        f"overlap_gain={median('hybrid', 'after') / hybrid:.3f}"
        f" sharded_slots_share={share:.3f}"
        f" pipeline_over_hybrid={median('pipeline', 'overlapped') / hybrid:.3f}"
        f" horovod_over_hybrid={median('horovod', 'overlapped') / hybrid:.3f}"
    )


if __name__ == "__main__":
    main()
