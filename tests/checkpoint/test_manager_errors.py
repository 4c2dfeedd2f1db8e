"""Bad input to smp.CheckpointManager: an error on every rank, and nothing is lost."""

import pathlib
from collections.abc import Callable
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from tests.checkpoint.manager_jobs import (
    assert_same,
    batches,
    net,
    optimizer_of,
    start,
    trainer,
    values_of,
)
from tests.ranks import ranks


def change(file: pathlib.Path, change_bytes: Callable[[bytes], bytes]) -> None:
    """On rank 0, for all."""
    if smp.rank() == 0:
        file.write_bytes(change_bytes(file.read_bytes()))
    smp.barrier()


def flipped(content: bytes) -> bytes:
    middle = len(content) // 2
    return content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :]


def expect(error: type[Exception], *texts: str) -> Any:
    return pytest.raises(error, match="(?s)" + "".join(f"(?=.*{t})" for t in texts))


@ranks(2, timeout=110)
def test_bad_input_is_named_on_every_rank(tmp_path: pathlib.Path) -> None:
    start()
    model, optimizer = net(smp.DistributedModel), optimizer_of("new")
    checkpoint = tf.train.Checkpoint(optimizer=optimizer, model=model)
    directory = tmp_path / "saves"
    manager = smp.CheckpointManager(checkpoint, str(directory))
    assert manager.restore() is None and manager.latest_checkpoint is None
    train, data = trainer(model, optimizer), iter(batches())
    train(*next(data))
    manager.save()
    train(*next(data))
    values = values_of(checkpoint)

    def refused(*texts: str, prefix: str | None = None) -> None:
        with expect(smp.ConfigError, *texts):
            manager.restore(prefix)
        assert_same(values_of(checkpoint), values)  # no variable was touched

    part = directory / "mp_rank_1"
    file = next(part.glob("ckpt-1.data-*"))
    good = file.read_bytes()
    smp.barrier()
    change(file, flipped)
    refused("damaged", str(file), "wrong checksum", "model/")
    change(file, lambda content: content[:-1])
    refused("cut", str(file), f"bytes={len(good) - 1} of {len(good)}")
    if smp.rank() == 0:
        file.unlink()
    smp.barrier()
    refused("missing", str(file))
    if smp.rank() == 0:
        file.write_bytes(good)
    smp.barrier()
    manifest = part / "ckpt-1.manifest.json"
    text = manifest.read_bytes()
    smp.barrier()
    change(manifest, lambda content: content[:99])
    refused("manifest cannot be read", str(manifest))
    change(manifest, lambda content: text)
    if smp.rank() == 0:
        part.rename(directory / "elsewhere")
    smp.barrier()
    refused("parts .* are missing", str(manifest))
    if smp.rank() == 0:
        (directory / "elsewhere").rename(part)
    smp.barrier()
    refused("no such checkpoint", "ckpt-7", prefix="ckpt-7")
    refused("restore_prefix='nonsense'", prefix="nonsense")
    with expect(smp.ConfigError, "never overwritten", "checkpoint_number=1"):
        manager.save(checkpoint_number=1)
    # A disk that cannot be written: a file is where a folder must be.
    blocked = tmp_path / "blocked"
    if smp.rank() == 0:
        blocked.mkdir()
        (blocked / "mp_rank_1").write_text("")
    smp.barrier()
    with expect(smp.SmpError, "rank 1", "mp_rank_1"):
        smp.CheckpointManager(checkpoint, str(blocked)).save()
    # Ranks that do not agree, or one that is wrong.
    for options, text in (
        ({"max_to_keep": 1 + smp.rank()}, "`max_to_keep`: rank 0: 1, rank 1: 2"),
        ({"directory": f"{directory}{smp.rank()}"}, "`directory`: rank 0: .*saves0"),
        ({"max_to_keep": smp.rank()}, "rank 0: `max_to_keep` is a number, at least 1"),
    ):
        with expect(smp.ConfigError, text):
            smp.CheckpointManager(checkpoint, **{"directory": directory, **options})
    # Another model; another optimizer.
    other = net(smp.DistributedModel, width=13)
    wide = tf.train.Checkpoint(model=other)
    trainer(other, optimizer_of("new"))(*next(data))
    with expect(smp.ConfigError, "model/last/kernel", "13", "12"):
        smp.CheckpointManager(wide, str(directory)).restore()
    extra = tf.train.Checkpoint(optimizer=optimizer, model=model, more=tf.Variable(1))
    with expect(smp.ConfigError, "more", "not in the checkpoint"):
        smp.CheckpointManager(extra, str(directory)).restore()
    # What was good is good.
    assert manager.restore() is not None
    assert manager.save() == str(directory / f"mp_rank_{smp.rank()}" / "ckpt-2")
