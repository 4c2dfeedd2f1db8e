"""Parts of a checkpoint become one of plain TensorFlow, or weights of a plain model.

The truth is plain Keras: it goes on with what it reads as the partitioned model does.
"""

import pathlib
import shutil
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.__main__ import main
from smp_tf.checkpoint.merging import merge
from tests.ranks import ROOT, run_ranks

K = tf.keras
X = np.random.RandomState(3).rand(8, 6).astype(np.float32)
Y = X[:, :3]

OPTIMIZERS = {
    "adam": lambda: K.optimizers.Adam(0.01),
    "momentum": lambda: K.optimizers.SGD(0.1, momentum=0.9),
    "legacy": lambda: K.optimizers.legacy.Adam(0.01),
    "scaled": lambda: K.mixed_precision.LossScaleOptimizer(K.optimizers.Adam(0.01)),
}


def build(base: type, optimizer: str) -> Any:
    class Net(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="net")
            self.scale = self.add_weight("scale", [5], initializer="ones")
            self.seen = self.add_weight("seen", [], tf.int64, "zeros", trainable=False)
            self.many = [K.layers.Dense(5, "tanh", name=f"d{i}") for i in range(3)]
            self.last = K.Sequential([K.layers.Dense(3)], name="last")

        def call(self, x: tf.Tensor) -> tf.Tensor:
            for layer in self.many:
                x = layer(x)
            return self.last(x * self.scale)

    model = Net()
    model.compile(OPTIMIZERS[optimizer](), "mse")
    return model


def fit(model: Any, epochs: int) -> None:
    model.fit(X, Y, batch_size=8, epochs=epochs, shuffle=False, verbose=0)


def save_parts(folder: pathlib.Path) -> dict[str, list[Any]]:
    """Weights when saved, and an epoch later."""
    smp.init({"partitions": 2, "microbatches": 2})
    found = {}
    for name in OPTIMIZERS:
        K.utils.set_random_seed(1)
        model = build(smp.DistributedModel, name)
        fit(model, 2)
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        manager = smp.CheckpointManager(checkpoint, str(folder / name))
        manager.save()
        saved = model.get_weights()
        fit(model, 1)
        found[name] = [saved, model.get_weights()]
        if name == "adam":
            manager.save()
    return found


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    folder = tmp_path_factory.mktemp("parts")
    return folder, run_ranks(2, save_parts, folder, timeout=150)[0]


def check_close(model: Any, expected: list[Any], tolerance: float = 0.0) -> None:
    for one, other in zip(model.get_weights(), expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_plain_keras_goes_on(
    parts: tuple[pathlib.Path, Any], tmp_path: pathlib.Path, name: str
) -> None:
    folder, weights = parts
    saved, later = weights[name]
    path = str(tmp_path / "whole")
    assert merge(folder / name, path, "ckpt-1") == "ckpt-1"
    for has_variables in (True, False):
        model = build(K.Model, name)
        if has_variables:
            model.build([None, 6])
        checkpoint = tf.train.Checkpoint(model=model, optimizer=model.optimizer)
        status = checkpoint.restore(path)
        if has_variables:
            check_close(model, saved)
        fit(model, 1)
        status.assert_existing_objects_matched()
        check_close(model, later, 1e-5)
        assert int(model.optimizer.iterations) == 3
    other = build(K.Model, name)
    other.load_weights(path)
    other.build([None, 6])
    check_close(other, saved)


def test_full_weights(parts: tuple[pathlib.Path, Any]) -> None:
    folder, weights = parts
    model = build(K.Model, "momentum")
    with pytest.raises(smp.ConfigError, match="model='net'; call it, or model.build"):
        smp.load_full_weights(model, folder / "adam")
    model.build([None, 6])
    assert smp.load_full_weights(model, folder / "adam") == "ckpt-2"
    check_close(model, weights["adam"][1])
    assert smp.load_full_weights(model, str(folder / "adam"), "ckpt-1") == "ckpt-1"
    check_close(model, weights["adam"][0])
    with pytest.raises(smp.ConfigError, match="no such checkpoint.*ckpt-7"):
        smp.load_full_weights(model, folder / "adam", "ckpt-7")
    with pytest.raises(smp.ConfigError, match="no whole checkpoint.*adam/none"):
        smp.load_full_weights(model, folder / "adam" / "none")
    with pytest.raises(smp.ConfigError, match="prefix='ckpt'"):
        smp.load_full_weights(model, folder / "adam", "ckpt")
    wide = build(K.Model, "adam")
    wide.build([None, 7])
    before = wide.get_weights()
    is_other = r"model/many/0/kernel is \(7, 5\) float32, in the checkpoint \(6, 5\)"
    with pytest.raises(smp.ConfigError, match=is_other):
        smp.load_full_weights(wide, folder / "adam")
    check_close(wide, before)


def test_full_weights_need_no_kernels(parts: tuple[pathlib.Path, Any]) -> None:
    folder, _ = parts
    program = (
        "import ctypes\n"
        "def refuse(self, name, *args, **kwargs):\n"
        "    raise OSError(name)\n"
        "import tensorflow as tf\n"
        "import smp_tf as smp\n"
        "ctypes.CDLL.__init__ = refuse\n"
        "tf.load_op_library = refuse\n"
        "from tests.checkpoint.test_merge import *\n"
        "model = build(K.Model, 'adam'); model.build([None, 6])\n"
        f"print(smp.load_full_weights(model, {str(folder / 'adam')!r}))\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert result.stdout.split() == ["ckpt-2"], result.stderr


def run(
    capsys: Any, monkeypatch: Any, *arguments: Any
) -> tuple[int, list[str], list[str]]:
    """(exit code, printed lines, lines of errors) of the command."""
    words = ["smp_tf", "checkpoint", *map(str, arguments)]
    monkeypatch.setattr(sys, "argv", words)
    code = main()
    printed = capsys.readouterr()
    return code, printed.out.splitlines(), printed.err.splitlines()


def test_commands(
    parts: tuple[pathlib.Path, Any],
    tmp_path: pathlib.Path,
    capsys: Any,
    monkeypatch: Any,
) -> None:
    directory = tmp_path / "adam"
    shutil.copytree(parts[0] / "adam", directory)
    code, lines, _ = run(capsys, monkeypatch, "inspect", directory)
    assert code == 0
    assert lines[0].startswith("ckpt-2: 2 ranks, 2 partition(s) x 1 replica(s);")
    assert lines[1] == "there are: ckpt-1, ckpt-2"
    rows = {line.split()[1]: line.split() for line in lines[4:-3]}
    kernel = ["0", "model/many/0/kernel", "6", "x", "5", "float32", "120"]
    assert rows["model/many/0/kernel"] == kernel
    assert "optimizer/slot/_momentums/model/many/0/kernel" in rows
    assert lines[-1].split()[:3] == ["all", str(len(rows)), "variables"]

    code, lines, _ = run(capsys, monkeypatch, "verify", directory)
    assert code == 0 and lines == ["ckpt-1: whole", "ckpt-2: whole"]

    out = tmp_path / "new" / "whole"
    code, lines, _ = run(capsys, monkeypatch, "merge", directory, out)
    assert code == 0 and lines == [f"wrote {out}.index, from ckpt-2"]
    merged = tf.train.load_checkpoint(str(out))
    assert merged.get_tensor("save_counter/.ATTRIBUTES/VARIABLE_VALUE") == 2
    code, _, errors = run(capsys, monkeypatch, "merge", directory, out)
    assert code == 2 and "there is a checkpoint already" in errors[-1]
    code, _, errors = run(capsys, monkeypatch, "merge", directory, tmp_path)
    assert code == 2 and "is not a folder" in errors[-1]
    (tmp_path / "file").write_text("")
    code, _, errors = run(
        capsys, monkeypatch, "merge", directory, tmp_path / "file" / "whole"
    )
    assert code == 2 and "cannot write a checkpoint: file=" in errors[-1]


def test_damage_is_named(
    parts: tuple[pathlib.Path, Any],
    tmp_path: pathlib.Path,
    capsys: Any,
    monkeypatch: Any,
) -> None:
    directory = tmp_path / "adam"
    shutil.copytree(parts[0] / "adam", directory)
    (data,) = (directory / "mp_rank_0").glob("ckpt-2.data-*")
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    (cut,) = (directory / "mp_rank_1").glob("ckpt-2.data-*")
    cut.write_bytes(cut.read_bytes()[:-5])
    code, lines, _ = run(capsys, monkeypatch, "verify", directory)
    assert code == 1 and lines[:2] == ["ckpt-1: whole", "ckpt-2: damaged"]
    assert f"  file={data}: wrong checksum" in lines
    assert any(line.startswith(f"  file={cut}: ") for line in lines)
    damaged = [line.split()[0] for line in lines if line.endswith("cannot be read")]
    assert len(damaged) >= 2
    name = damaged[0].removeprefix("variable=")

    out = tmp_path / "whole"
    code, _, errors = run(capsys, monkeypatch, "merge", directory, out)
    assert code == 2 and f"variable={name!r}" in errors[-1]
    assert not list(tmp_path.glob("whole*"))
    code, _, _ = run(
        capsys, monkeypatch, "verify", directory, "--prefix", "ckpt-1"
    )
    assert code == 0
    shutil.rmtree(directory / "mp_rank_1")
    code, _, errors = run(
        capsys, monkeypatch, "merge", directory, out, "--prefix", "ckpt-1"
    )
    assert code == 2 and "mp_rank_1" in errors[-1] and "missing" in errors[-1]
