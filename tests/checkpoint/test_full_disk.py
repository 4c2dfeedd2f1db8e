"""Disks that are full, each at another file of a save: real ones, of a few pages."""

import contextlib
import os
import pathlib
import subprocess
from collections.abc import Iterator

import pytest
import tensorflow as tf

import smp_tf as smp
from tests.unit.one_process import session

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.fixture
def disk(tmp_path: pathlib.Path) -> Iterator[pathlib.Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        done = subprocess.run(mount, capture_output=True, text=True)
    except OSError as error:
        pytest.skip(f"no mount: {error}")
    if done.returncode:
        pytest.skip(f"mounting needs root: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@contextlib.contextmanager
def filled(disk: pathlib.Path, pages: int) -> Iterator[None]:
    """Inside, only so many pages are free."""
    file = disk / "fill"
    free = os.statvfs(disk).f_bavail
    file.write_bytes(b"x" * (PAGE * (free - pages)))
    try:
        yield
    finally:
        file.unlink()


@pytest.mark.parametrize("blocking", [True, False])
def test_the_file_and_a_remedy_are_told(disk: pathlib.Path, blocking: bool) -> None:
    with session():
        values = [tf.Variable(tf.ones([100])) for _ in range(3)]
        checkpoint = tf.train.Checkpoint(values=values)
        manager = smp.CheckpointManager(checkpoint, str(disk / "saves"))
        manager.save()
        told = []
        for pages in range(8):
            before = manager.checkpoints
            with filled(disk, pages):
                try:
                    manager.save(blocking=blocking)
                    manager.wait()
                    continue
                except smp.SmpError as error:
                    told.append(str(error))
            is_whole = "a checkpoint is whole" in told[-1]  # all but the small files
            assert manager.checkpoints[: -1 if is_whole else None] == before
            assert manager.restore() == manager.latest_checkpoint
        assert len(told) >= 3
        for text in told:
            assert str(disk / "saves" / "mp_rank_0" / "c") in text
            assert "free space" in text
        assert manager.save()
