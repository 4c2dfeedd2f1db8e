"""Does a step need the memory, and take the time, that its plan says?

    python benchmarks/plan_vs_measured.py

Memory: trains models with Adam for two steps, split over 2 and over 4 processes that
`horovodrun` starts afresh for each row, each pinned to one core: a stack of Dense
layers whose weights count, a transformer and convolutions whose activations do. Of each
rank:

    weights .. plan     MB of the plan of that very step, by part, and their sum
    tensors             most that TensorFlow's allocator had given out at once, and how
                        far the plan is from it; "-" where TensorFlow does not say (it
                        does with oneDNN's allocator)
    process             resident memory before the model is made: the interpreter,
                        TensorFlow's code, a step of a model of a few hundred weights
    graphs              what the same program takes beyond that, at its peak and in
                        processes of its own, when every width and length is next to
                        nothing: traces, graphs and what runs them
    expected, peak      plan + process + graphs; peak resident memory of the process
                        (VmHWM); how far the first is from the second

The base of a prediction is process + graphs: all that is not a tensor.

Time: two ranks, a core and a thread each, take turns at one step of a model under
different numbers of microbatches and borders. Pairs of configurations that the plan
says to differ by more than 8 % shall differ in the same direction in the medians.

The last line: the worst error of what was expected, and the pairs that are right.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import host

MB = 2**20
ROOT = Path(__file__).resolve().parent.parent
STEPS = 2

# (model, ranks, schedule, microbatches)
MEMORY = (
    ("dense", 2, "interleaved", 4),
    ("dense", 4, "interleaved", 4),
    ("transformer", 2, "simple", 4),
    ("transformer", 2, "interleaved", 4),
    ("convolutions", 2, "simple", 8),
    ("convolutions", 2, "interleaved", 8),
    ("convolutions", 4, "simple", 4),
)

# (name, microbatches, blocks on rank 0 of 2)
BLOCKS = 8
TIME = (
    ("microbatches=1", 1, 4),
    ("microbatches=2", 2, 4),
    ("microbatches=4", 4, 4),
    ("microbatches=8", 8, 4),
    ("microbatches=4 blocks=6:2", 4, 6),
    ("microbatches=8 blocks=7:1", 8, 7),
)
ROUNDS = 7
APART = 1.08  # pairs whose predicted times differ by more are compared


# --- what runs on each rank -----------------------------------------------------------


def dense(smp: Any, tf: Any, rows: int, is_small: bool) -> tuple[Any, Any]:
    """600 MB of weights; 16 rows in a microbatch."""
    width, hidden = (8, 32) if is_small else (1536, 6144)
    inputs = tf.ones([rows if is_small else 16 * rows, width])
    return residual_stack(smp, tf, 8, width, hidden), inputs


def residual_stack(
    smp: Any, tf: Any, blocks: int, width: int, hidden: int, on_first: int = 0
) -> Any:
    """x = x + two Dense layers; the first `on_first` blocks on rank 0 if it is said."""
    layers = tf.keras.layers

    class Stack(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [
                (layers.Dense(hidden, "relu"), layers.Dense(width))
                for _ in range(blocks)
            ]

        def call(self, x: Any) -> Any:
            for i, (up, down) in enumerate(self.blocks):
                with place(smp, on_first, i):
                    x = x + down(up(x))
            return x

    return Stack()


def place(smp: Any, on_first: int, block: int) -> Any:
    return (
        smp.partition(int(block >= on_first)) if on_first else contextlib.nullcontext()
    )


def transformer(smp: Any, tf: Any, rows: int, is_small: bool) -> tuple[Any, Any]:
    """6 blocks of attention; their scores are a third of what is kept."""
    from smp_tf.examples.char_gpt import Block

    dim = 16 if is_small else 192

    class Blocks(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [Block(dim, 8) for _ in range(6)]

        def call(self, x: Any) -> Any:
            for block in self.blocks:
                x = block(x)
            return x

    return Blocks(), tf.ones([rows, 8, dim] if is_small else [16 * rows, 256, dim])


def convolutions(smp: Any, tf: Any, rows: int, is_small: bool) -> tuple[Any, Any]:
    """8 residual blocks of two convolutions, batch normalization between them."""
    layers = tf.keras.layers

    class Images(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = [
                (
                    layers.Conv2D(8, 3, padding="same"),
                    layers.BatchNormalization(),
                    layers.Conv2D(8, 3, padding="same"),
                )
                for _ in range(8)
            ]

        def call(self, x: Any) -> Any:
            for first, norm, second in self.blocks:
                x = x + second(tf.nn.relu(norm(first(x), training=True)))
            return x

    shape = [rows, 4, 4, 8] if is_small else [64 * rows, 96, 96, 8]
    return Images(), tf.ones(shape)


MODELS = {"dense": dense, "transformer": transformer, "convolutions": convolutions}


def training(smp: Any, tf: Any, model: Any, inputs: Any) -> tuple[Any, Any]:
    """The step's plan, and a function that trains for one batch."""
    optimizer = tf.keras.optimizers.Adam(1e-4)

    @smp.step
    def forward_backward(inputs: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(inputs)))
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train_step(inputs: Any) -> Any:
        gradients, loss = forward_backward(inputs)
        gradients = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(gradients, model.trainable_variables))
        return loss.reduce_mean()

    return forward_backward.plan(inputs), lambda: train_step(inputs).numpy()


def status_bytes(name: str) -> int:
    """A figure of this process: VmRSS, VmHWM."""
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def allocated_bytes(tf: Any) -> int | None:
    """The most that TensorFlow's allocator had given out, if it says so."""
    try:
        return int(tf.config.experimental.get_memory_info("CPU:0")["peak"])
    except ValueError:
        return None


def start(config: dict[str, Any]) -> tuple[Any, Any]:
    """Pin this rank to a core, before TensorFlow counts cores, and begin."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(os.environ["HOROVOD_LOCAL_RANK"]) % len(cores)]
    os.sched_setaffinity(0, {core})

    import smp_tf as smp  # isort: skip  (first: it selects Keras 2)

    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    smp.init({"partitions": int(os.environ["HOROVOD_SIZE"]), **config})
    tf.keras.utils.set_random_seed(1)
    return smp, tf


def measure_memory(
    model: str, pipeline: str, microbatches: int, is_small: bool
) -> None:
    """Train; rank 0 says what was planned and what there was, of each rank."""
    smp, tf = start({"microbatches": microbatches, "pipeline": pipeline})

    from smp_tf.plan.memory import memory_by_rank

    tiny = residual_stack(smp, tf, smp.size(), 8, 8)
    _, train = training(smp, tf, tiny, tf.ones([microbatches, 8]))
    for _ in range(2):
        train()
    process = status_bytes("VmRSS")
    chosen = MODELS[model](smp, tf, microbatches, is_small)
    plan, train = training(smp, tf, *chosen)
    for _ in range(STEPS):
        train()
    memory = memory_by_rank(plan)[smp.pp_rank()]
    row = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer": memory.optimizer,
        "activations": memory.activations,
        "update": memory.update,
        "allocator": memory.allocator,
        "plan": memory.total,
        "tensors": allocated_bytes(tf),
        "process": process,
        "peak": status_bytes("VmHWM"),
    }
    say(smp, smp.allgather(row, smp.WORLD))
    smp.shutdown()


def measure_time(microbatches: int, on_first: int, turns: Path) -> None:
    """Build a step; train for one batch whenever the launching process says so."""
    by_hand = {"auto_partition": False, "default_partition": 1}  # where the loss is
    smp, tf = start({"microbatches": microbatches, **by_hand})
    model = residual_stack(smp, tf, BLOCKS, 512, 2048, on_first)
    plan, train = training(smp, tf, model, tf.ones([512, 512]))
    train()
    say(smp, plan.report.seconds)
    for turn in range(ROUNDS):
        while not (turns / str(turn)).exists():
            time.sleep(0.01)
        smp.barrier()
        before = time.perf_counter()
        train()
        smp.barrier()
        say(smp, time.perf_counter() - before)
    smp.shutdown()


def say(smp: Any, value: Any) -> None:
    """Hand a value to the launching process."""
    if smp.rank() == 0:
        print("said=" + json.dumps(value), flush=True)


# --- what launches them ---------------------------------------------------------------


class Job:
    """This file on some ranks, and what their rank 0 says."""

    def __init__(self, ranks: int, *arguments: str) -> None:
        command = [str(Path(sys.executable).parent / "horovodrun"), "--gloo"]
        command += ["-np", str(ranks)]
        command += [sys.executable, str(Path(__file__).resolve()), "--rank"]
        command += arguments
        quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
        self._process = subprocess.Popen(
            command,
            env={**quiet, **os.environ},
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def next(self) -> Any:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            found = re.search(r"said=(.*)", line)
            if found:
                return json.loads(found[1])
        sys.exit(f"a job ended early: {self._process.args}")

    def __enter__(self) -> Job:
        return self

    def __exit__(self, kind: Any, *_: object) -> None:
        """Wait for its end, or stop it if something went wrong here."""
        if kind is not None:
            self._process.terminate()
        if self._process.wait() and kind is None:
            sys.exit(f"a job failed: {self._process.args}")


PARTS = (
    *("weights", "gradients", "optimizer", "activations", "update", "allocator"),
    "plan",
)


def compare_memory(rows: Sequence[tuple[str, int, str, int]]) -> float:
    """Print the table; the worst error of what was expected."""
    names = (*PARTS, "tensors", "error", "process", "graphs", "expected", "peak")
    print("memory, MB\nrank " + "".join(f"{name:>12}" for name in (*names, "error")))
    worst = worst_without_graphs = 0.0
    for model, ranks, pipeline, microbatches in rows:
        print(f"{model}, {ranks} ranks, {pipeline}, {microbatches} microbatches")
        found, small = (
            memory_of_job(ranks, model, pipeline, str(microbatches), size)
            for size in ("real", "small")
        )
        for rank, (row, least) in enumerate(zip(found, small, strict=True)):
            graphs = least["peak"] - least["process"]
            expected = row["plan"] + row["process"] + graphs
            error = expected / row["peak"] - 1
            worst = max(worst, abs(error))
            error_without = (expected - graphs) / row["peak"] - 1
            worst_without_graphs = max(worst_without_graphs, abs(error_without))
            sizes: list[int | None] = [row[name] for name in (*PARTS, "tensors")]
            sizes += [row["process"], graphs, expected, row["peak"]]
            cells = [f"{'-' if n is None else round(n / MB):>12}" for n in sizes]
            share = row["tensors"] and row["plan"] / row["tensors"] - 1
            cells.insert(7, f"{'-':>12}" if share is None else f"{share:12.1%}")
            print(f"{rank:<5}" + "".join(cells) + f"{error:12.1%}", flush=True)
    print(f"without the graphs the worst error would be {worst_without_graphs:.3f}")
    return worst


def memory_of_job(ranks: int, *arguments: str) -> list[dict[str, Any]]:
    with Job(ranks, "memory", *arguments) as job:
        found: list[dict[str, Any]] = job.next()
    return found


def compare_time(rows: Sequence[tuple[str, int, int]]) -> tuple[int, int]:
    """Print the table; (pairs in the predicted order, pairs)."""
    with contextlib.ExitStack() as stack:
        jobs, folders = [], []
        for _, microbatches, on_first in rows:
            folder = stack.enter_context(tempfile.TemporaryDirectory())
            folders.append(Path(folder))
            job = Job(2, "time", str(microbatches), str(on_first), folder)
            jobs.append(stack.enter_context(job))
        predicted = [job.next() for job in jobs]
        measured: list[list[float]] = [[] for _ in rows]
        for turn in range(ROUNDS):
            for job, folder_path, times in zip(jobs, folders, measured, strict=True):
                (folder_path / str(turn)).touch()
                times.append(job.next())
    medians = [statistics.median(times) for times in measured]
    print(f"time of a step, relative to the first row ({ROUNDS} turns, medians)")
    print(f"{'':28}{'predicted':>12}{'measured':>12}{'seconds':>12}{'range':>14}")
    for (name, _, _), plan, median, times in zip(
        rows, predicted, medians, measured, strict=True
    ):
        print(
            f"{name:28}{plan / predicted[0]:12.2f}{median / medians[0]:12.2f}"
            f"{median:12.3f}{f'{min(times):.3f}..{max(times):.3f}':>14}"
        )
    right = total = 0
    for a, b in itertools.combinations(range(len(rows)), 2):
        slow, fast = (a, b) if predicted[a] > predicted[b] else (b, a)
        if predicted[slow] <= APART * predicted[fast]:
            continue
        total += 1
        if medians[slow] > medians[fast]:
            right += 1
        else:
            print(f"not as predicted: {rows[slow][0]} faster than {rows[fast][0]}")
    return right, total


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", choices=["memory", "time"], help="half of it")
    parser.add_argument("--rank", nargs="+", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.rank:
        kind, *rest = given.rank
        if kind == "memory":
            measure_memory(rest[0], rest[1], int(rest[2]), rest[3] == "small")
        else:
            measure_time(int(rest[0]), int(rest[1]), Path(rest[2]))
        return 0
    print(host.describe())
    results = []
    if given.only != "time":
        results.append(f"memory_error={compare_memory(MEMORY):.3f}")
    if given.only != "memory":
        right, total = compare_time(TIME)
        results.append(f"order_right={right}/{total}")
    print(" ".join(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
