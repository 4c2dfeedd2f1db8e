"""How fast does a tensor get from one process to another?

    python benchmarks/send_recv.py

Starts two processes with `horovodrun`, each pinned to one core, and bounces a float32
tensor between them inside `tf.function`: through smp_tf's send and receive ops, and
through `hvd.broadcast` (root 0, then root 1). One hop is half a round trip. Beside them
the time of one plain copy of the same bytes in memory. All three take turns in the same
run; the figures are medians.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Callable

import host
import numpy as np

KIB, MIB = 1024, 1024**2
# bytes of the tensor -> round trips inside one call, so that the call itself is cheap
SIZES = {64: 32, KIB: 32, 64 * KIB: 16, MIB: 4, 16 * MIB: 2, 64 * MIB: 1}
LATENCY_BYTES, BANDWIDTH_BYTES = KIB, 16 * MIB
ROOT = Path(__file__).resolve().parent.parent


def launch(repeats: int) -> int:
    """Run this file on two ranks; print their output without the launcher's prefix."""
    command = [str(Path(sys.executable).parent / "horovodrun"), "--gloo", "-np", "2"]
    command += [sys.executable, str(Path(__file__).resolve()), "--rank"]
    quiet = {"TF_CPP_MIN_LOG_LEVEL": "3", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(
        command + ["--repeats", str(repeats)],
        env={**quiet, **os.environ},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        print(re.sub(r"^\[\d+\]<stdout>:", "", line), end="", flush=True)
    return process.wait()


def bounce_smp(num_elements: int, rounds: int) -> Callable:
    """A function of one tensor: `rounds` round trips through smp_tf's ops."""
    import tensorflow as tf

    import smp_tf as smp
    from smp_tf.transport import ops

    rank, peer = smp.rank(), 1 - smp.rank()

    def send(tensor, channel):
        post = ops.send_post(
            tensor, peer=peer, channel=channel, shape=[num_elements], label="bounce"
        )
        return [post]

    def receive(after, channel):
        route = dict(peer=peer, channel=channel, label="bounce")
        with tf.control_dependencies(after):
            post = ops.recv_post(tf.float32, [num_elements], **route)
        with tf.control_dependencies([post]):
            return ops.recv_wait(tf.float32, [num_elements], **route)

    @tf.function(input_signature=[tf.TensorSpec([num_elements])])
    def bounce(tensor):
        after: list = []
        for index in range(rounds):
            there, back = 2 * index, 2 * index + 1
            if rank == 0:
                with tf.control_dependencies(after):
                    posts = send(tensor, there)
                tensor = receive(posts, back)
            else:
                tensor = receive(after, there)
                posts = send(tensor, back)
            after = posts + [tensor.op]
        with tf.control_dependencies(after):
            flush = ops.send_flush()
        with tf.control_dependencies([flush]):
            return tf.identity(tensor)

    return bounce.get_concrete_function()


def bounce_horovod(num_elements: int, rounds: int) -> Callable:
    """The same round trips through Horovod's broadcast."""
    import horovod.tensorflow as hvd
    import tensorflow as tf

    @tf.function(input_signature=[tf.TensorSpec([num_elements])])
    def bounce(tensor):
        for index in range(rounds):
            for root in (0, 1):
                name = f"bounce_{num_elements}_{index}_{root}"
                tensor = hvd.broadcast(tensor, root_rank=root, name=name)
        return tensor

    return bounce.get_concrete_function()


def seconds_of(function: Callable, *arguments: object) -> float:
    start = time.perf_counter()
    function(*arguments)
    return time.perf_counter() - start


def measure(repeats: int) -> dict[int, dict[str, float]]:
    """Median seconds of one hop: size in bytes -> smp, horovod, memcpy."""
    import tensorflow as tf

    import smp_tf as smp

    tensors, ways, memory = {}, {}, {}
    for size, rounds in SIZES.items():
        count = size // 4
        tensors[size] = tf.constant(np.arange(count, dtype=np.float32))
        ways[size] = {
            "smp": bounce_smp(count, rounds),
            "horovod": bounce_horovod(count, rounds),
        }
        memory[size] = (np.ones(count, np.float32), np.zeros(count, np.float32))
        for way in ways[size].values():  # warm, and the bytes must come back
            np.testing.assert_array_equal(way(tensors[size]), tensors[size])

    samples: dict = {size: {"smp": [], "horovod": [], "memcpy": []} for size in SIZES}
    for _ in range(repeats):
        for size, rounds in SIZES.items():
            for name, way in ways[size].items():
                smp.barrier()  # both ranks start together
                run = seconds_of(lambda: way(tensors[size]).numpy())
                samples[size][name].append(run / (2 * rounds))
            source, target = memory[size]
            samples[size]["memcpy"].append(seconds_of(np.copyto, target, source))
    return {
        size: {name: statistics.median(values) for name, values in by_name.items()}
        for size, by_name in samples.items()
    }


def report(medians: dict[int, dict[str, float]]) -> None:
    print(f"{'bytes':>10} {'smp':>22} {'horovod broadcast':>22} {'memcpy':>22} smp/hvd")
    for size, by_name in medians.items():
        cells = [
            f"{seconds * 1e6:10.1f} us {size / seconds / 1e9:5.2f} GB/s"
            for seconds in by_name.values()
        ]
        ratio = by_name["horovod"] / by_name["smp"]
        print(f"{size:>10} " + " ".join(f"{c:>22}" for c in cells) + f" {ratio:7.2f}")
    at = medians[BANDWIDTH_BYTES]
    print(
        f"bw16mb_over_hvd={at['horovod'] / at['smp']:.2f} "
        f"latency_us={medians[LATENCY_BYTES]['smp'] * 1e6:.1f}",
        flush=True,
    )


def run_rank(repeats: int) -> None:
    # Before TensorFlow counts cores: one core for each rank.
    cores = sorted(os.sched_getaffinity(0))
    core = cores[int(os.environ["HOROVOD_LOCAL_RANK"]) % len(cores)]
    os.sched_setaffinity(0, {core})

    import smp_tf as smp  # isort: skip  (first: it selects Keras 2)
    import horovod.tensorflow as hvd

    smp.init()
    hvd.init()
    medians = measure(repeats)
    if smp.rank() == 0:
        print(host.describe())
        print(f"ranks: 2, one core each; {repeats} repeats, medians of one hop")
        report(medians)
    smp.barrier()
    smp.shutdown()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--rank", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if not options.rank:
        return launch(options.repeats)
    run_rank(options.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
