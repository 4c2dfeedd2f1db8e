"""Saves that are not whole, as seen from here: neither taken for others nor removed."""

import json
import pathlib
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.__main__ import main
from smp_tf.checkpoint import manifest as manifest_lib
from smp_tf.checkpoint.merging import merge
from tests.unit.one_process import session

K = tf.keras


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    with session():
        yield


def manager_of(folder: pathlib.Path, value: float = 0.0, **options: Any) -> Any:
    """(manager, variable)"""
    variable = tf.Variable(value)
    checkpoint = tf.train.Checkpoint(value=variable)
    return smp.CheckpointManager(checkpoint, str(folder), **options), variable


def saved(folder: pathlib.Path, *numbers: int) -> None:
    """Each has its number as its value."""
    manager, variable = manager_of(folder)
    for number in numbers:
        variable.assign(float(number))
        manager.save(checkpoint_number=number)


def manifests(folder: pathlib.Path) -> list[str]:
    files = folder.glob("mp_rank_0/*.manifest.json")
    return sorted(file.name.partition(".")[0] for file in files)


def of_other_version(file: pathlib.Path) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), "version": 99}))


def damaged(file: pathlib.Path) -> None:
    file.write_text(file.read_text()[:50])


@pytest.mark.parametrize("spoil", [of_other_version, damaged])
def test_a_save_stays_of_which_the_manifest_cannot_be_read(
    tmp_path: pathlib.Path, spoil: Any
) -> None:
    saved(tmp_path, 1, 2)
    for number in (1, 2):
        spoil(tmp_path / f"mp_rank_0/ckpt-{number}.manifest.json")
    (tmp_path / "mp_rank_0/checkpoint").unlink()
    manager, _ = manager_of(tmp_path, max_to_keep=1)
    assert str(manager.save()).endswith("ckpt-3")
    assert str(manager.save()).endswith("ckpt-4")
    assert manifests(tmp_path) == ["ckpt-1", "ckpt-2", "ckpt-4"]
    with pytest.raises(smp.ConfigError, match="never overwritten"):
        manager.save(checkpoint_number=2)


def test_a_save_stays_of_which_the_manifest_is_gone(tmp_path: pathlib.Path) -> None:
    saved(tmp_path, 1, 2, 3)
    file = tmp_path / "mp_rank_0/ckpt-3.manifest.json"
    text = file.read_text()
    file.unlink()
    manager, variable = manager_of(tmp_path, 4.0)
    for _ in range(2):
        manager.save()
    assert str(manager.latest_checkpoint).endswith("ckpt-5")
    file.write_text(text)  # from a copy
    assert manager.restore("ckpt-3") and float(variable) == 3.0
    # What people remove is no more.
    for each in tmp_path.glob("mp_rank_0/ckpt-2.*"):
        each.unlink()
    assert str(manager.save(checkpoint_number=2)).endswith("ckpt-2")
    assert float(variable) == 3.0 and manager.restore("ckpt-2")


def test_a_save_stays_of_which_a_part_is_elsewhere(tmp_path: pathlib.Path) -> None:
    saved(tmp_path, 1)
    file = tmp_path / "mp_rank_0/ckpt-1.manifest.json"
    content = json.loads(file.read_text())
    content["layout"]["mp_size"] = content["layout"]["pp_size"] = 2
    file.write_text(json.dumps(content))
    (tmp_path / "mp_rank_0/checkpoint").unlink()  # killed before it was written
    manager, _ = manager_of(tmp_path, max_to_keep=1)
    manager.save()
    assert manifests(tmp_path) == ["ckpt-1", "ckpt-2"]
    # With the folder of the other part it is what a killed save has left.
    (tmp_path / "mp_rank_1").mkdir()
    (tmp_path / "mp_rank_1/ckpt-1.index").write_text("")
    manager.save()
    assert manifests(tmp_path) == ["ckpt-3"]
    assert not list(tmp_path.glob("mp_rank_1/ckpt-1*"))


def test_no_older_save_is_taken_for_the_latest(
    tmp_path: pathlib.Path, capsys: Any, monkeypatch: Any
) -> None:
    model = K.Sequential([K.layers.Dense(2)])
    model.build([None, 3])
    folder = tmp_path / "saves"
    manager = smp.CheckpointManager(tf.train.Checkpoint(model=model), str(folder))
    manager.save()
    manager.save()
    (folder / "mp_rank_0/ckpt-2.manifest.json").unlink()
    gone = r"manifests are gone.*ckpt-2.*ckpt-2\.manifest\.json.*by its prefix"
    for call in (
        manager.restore,
        lambda: smp.load_full_weights(model, folder),
        lambda: merge(folder, tmp_path / "whole"),
    ):
        with pytest.raises(smp.ConfigError, match=gone):
            call()
    assert smp.load_full_weights(model, folder, "ckpt-1") == "ckpt-1"

    def verify() -> tuple[int, list[str]]:
        words = ["smp_tf", "checkpoint", "verify", str(folder)]
        monkeypatch.setattr(sys, "argv", words)
        return main(), capsys.readouterr().out.splitlines()

    code, lines = verify()
    assert code == 1 and [lines[0], lines[2]] == ["ckpt-2: broken", "ckpt-1: whole"]
    (folder / "mp_rank_0/ckpt-1.manifest.json").unlink()
    code, lines = verify()
    assert code == 1 and [lines[0], lines[2]] == ["ckpt-1: broken", "ckpt-2: broken"]


def test_the_latest_is_the_last_whatever_its_number_is(tmp_path: pathlib.Path) -> None:
    saved(tmp_path, 100, 5)
    (tmp_path / "mp_rank_0/ckpt-100.manifest.json").unlink()
    manager, variable = manager_of(tmp_path)
    assert manager.restore() == manager.latest_checkpoint
    assert float(variable) == 5.0
    saved(tmp_path, 3)
    (tmp_path / "mp_rank_0/ckpt-3.manifest.json").unlink()
    with pytest.raises(smp.ConfigError, match="manifests are gone.*ckpt-3"):
        manager.restore()


def test_managers_of_other_names_stay_apart(tmp_path: pathlib.Path) -> None:
    other, variable = manager_of(tmp_path, 7.0, checkpoint_name="ckpt-2.5")
    other.save()
    saved(tmp_path, 1, 2, 3)
    manager, _ = manager_of(tmp_path, max_to_keep=1)
    manager.save()
    variable.assign(0.0)
    assert other.restore() and float(variable) == 7.0
    # Each knows which of its saves were whole.
    (tmp_path / "mp_rank_0/ckpt-2.5-1.manifest.json").unlink()
    with pytest.raises(smp.ConfigError, match="manifests are gone"):
        other.restore()


def test_a_clean_up_that_fails_is_told_as_such(
    tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    manager, _ = manager_of(tmp_path, max_to_keep=1)
    manager.save()

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied", "ckpt-1.index")

    with monkeypatch.context() as patch:
        patch.setattr(type(manager._folder), "remove", lambda self, part, number: (
            refuse() if number == 1 else None
        ))
        told = "ckpt-2, but the clean-up.*ckpt-1.index"
        with pytest.raises(smp.SmpError, match=told):
            manager.save()
    assert [each[-6:] for each in manager.checkpoints] == ["ckpt-2"]
    manager.save()
    assert manifests(tmp_path) == ["ckpt-3"]


def test_new_folders_are_written_into_those_above(
    tmp_path: pathlib.Path, monkeypatch: Any
) -> None:
    synced, sync = [], manifest_lib.sync_folder
    monkeypatch.setattr(
        manifest_lib, "sync_folder", lambda each: (synced.append(each), sync(each))
    )
    manager_of(tmp_path / "a" / "b")[0].save()
    assert {tmp_path, tmp_path / "a", tmp_path / "a" / "b"} <= {*synced}
