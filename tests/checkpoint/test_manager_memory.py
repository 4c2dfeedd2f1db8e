"""What a checkpoint is restored from, or merged, is never in memory as a whole."""

import pathlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.ranks import run_ranks

MB = 2**20
WIDTH, DEPTH = 2290, 20  # variables of 20 MB, 400 MB in all
VARIABLE = WIDTH * WIDTH * 4
SLACK = 32 * MB  # graphs and functions, and what the allocator keeps


class Wide(smp.DistributedModel):
    def __init__(self, width: int = WIDTH) -> None:
        super().__init__(name="wide")
        self.dense = [
            tf.keras.layers.Dense(width, use_bias=False) for _ in range(DEPTH)
        ]

    def call(self, x: tf.Tensor) -> tf.Tensor:
        for layer in self.dense:
            x = layer(x)
        return x


def placed(model: Any, width: int = WIDTH) -> int:
    """Partition a model; bytes of this rank's share."""
    smp.step(lambda x: model(x)).plan(tf.ones([2, width]))
    return sum(int(np.prod(v.shape)) * 4 for v in model.variables)


def kept(model: Any) -> Any:
    """(number, layer) of the layers of this rank."""
    mine = {id(variable) for variable in model.variables}
    return [(i, e) for i, e in enumerate(model.dense) if id(e.kernel) in mine]


def saves(folder: str) -> None:
    smp.init({"microbatches": 2, "partitions": 2, "timeout_s": 60.0})
    model = Wide()
    placed(model)
    for number, layer in kept(model):
        layer.kernel.assign(tf.fill([WIDTH, WIDTH], float(number)))
    smp.CheckpointManager(tf.train.Checkpoint(model=model), folder).save()


def status(key: str) -> int:
    """Bytes, from what the kernel knows of this process."""
    text = pathlib.Path("/proc/self/status").read_text()
    (line,) = [each for each in text.splitlines() if each.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def restores(folder: str, size: int, is_placed: bool) -> tuple[int, int]:
    """(share, growth at its peak) in bytes, for a restore before or after the first
    step."""
    smp.init({"microbatches": 2, "partitions": size, "timeout_s": 60.0})
    placed(Wide(4), 4)  # what TensorFlow itself takes
    model = Wide()
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    before = status("VmRSS")
    if is_placed:
        placed(model)
    manager = smp.CheckpointManager(tf.train.Checkpoint(model=model), folder)
    assert manager.restore()
    share = placed(model)
    for number, layer in kept(model):
        assert float(layer.kernel[-1, -1]) == number
    return share, status("VmHWM") - before


def command_peak(*arguments: str) -> int:
    """Bytes that ``python -m smp_tf checkpoint`` has at its peak."""
    script = (
        "import resource, runpy, sys; sys.argv[0] = 'smp_tf'\n"
        "try: runpy.run_module('smp_tf', run_name='__main__', alter_sys=True)\n"
        "finally: print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, "checkpoint", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return int(done.stdout.split()[-1]) * 1024


@pytest.fixture
def place() -> Iterator[pathlib.Path]:
    """A folder that is gone at once: pytest would keep 800 MB."""
    with tempfile.TemporaryDirectory() as folder:
        yield pathlib.Path(folder)


@pytest.mark.timeout(330)
def test_of_a_checkpoint_a_share_and_a_variable_are_in_memory(
    place: pathlib.Path,
) -> None:
    folder = str(place / "checkpoints")
    run_ranks(2, saves, folder, timeout=100)
    for size, is_placed in ((3, False), (1, True)):
        found = run_ranks(size, restores, folder, size, is_placed, timeout=100)
        assert sum(share for share, _ in found) == DEPTH * VARIABLE
        for rank, (share, peak) in enumerate(found):
            limit = share + VARIABLE + SLACK
            text = f"rank {rank} of {size}: share={share / MB:.0f} peak={peak / MB:.0f}"
            print(text, "MB")
            assert share <= peak < limit, text
    nothing = command_peak("inspect", folder)
    merging = command_peak("merge", folder, str(place / "whole"))
    text = f"merge={merging / MB:.0f} inspect={nothing / MB:.0f}"
    print(text, "MB")
    assert merging - nothing < DEPTH // 2 * VARIABLE, text
    reader = tf.train.load_checkpoint(str(place / "whole"))
    sizes = reader.get_variable_to_shape_map().values()
    assert sum(shape == [WIDTH, WIDTH] for shape in sizes) == DEPTH
