"""Which GPU a rank takes; the GPUs are fakes (see ``tests.fake_gpus``)."""

import logging
from pathlib import Path

import pytest

from smp_tf.errors import ConfigError
from smp_tf.launch import Launch
from smp_tf.runtime import pinning
from smp_tf.runtime.pinning import Pinned, choose, compare, pin, pin_and_tell
from tests.fake_gpus import FakeGpus

UUIDS = tuple(f"GPU-{i}" for i in range(8))


def launched(local_rank: int, local_size: int) -> Launch:
    return Launch(local_rank, local_size, local_rank, local_size, "a", "a", 1)


def taken(gpus: int, local_size: int, share_gpu: bool) -> list[int | None] | None:
    """What the ranks of a host take; None if it is an error on all of them."""
    results: list[int | None] = []
    errors = 0
    for local_rank in range(local_size):
        try:
            results.append(choose(gpus, local_rank, local_size, share_gpu))
        except ConfigError:
            errors += 1
    assert errors in (0, local_size)
    return None if errors else results


@pytest.mark.parametrize(
    ("gpus", "local_size", "own", "shared"),
    [
        (0, 1, [None], [None]),
        (0, 4, [None] * 4, [None] * 4),
        (1, 1, [0], [0]),
        (1, 4, [0, 0, 0, 0], [0, 0, 0, 0]),  # one each, by CUDA_VISIBLE_DEVICES
        (2, 1, [0], [0]),
        (2, 2, [0, 1], [0, 1]),
        (2, 3, None, [0, 1, 0]),
        (2, 4, None, [0, 1, 0, 1]),
        (4, 2, [0, 1], [0, 1]),
        (4, 4, [0, 1, 2, 3], [0, 1, 2, 3]),
        (4, 8, None, [0, 1, 2, 3, 0, 1, 2, 3]),
        (8, 4, [0, 1, 2, 3], [0, 1, 2, 3]),
        (8, 8, list(range(8)), list(range(8))),
    ],
)
def test_choice(gpus, local_size, own, shared):
    assert taken(gpus, local_size, share_gpu=False) == own
    assert taken(gpus, local_size, share_gpu=True) == shared


def test_too_few_are_told_with_numbers_and_the_remedy():
    with pytest.raises(ConfigError) as caught:
        choose(2, 0, 4, False)
    text = str(caught.value)
    assert "GPUs=2, ranks on the host=4, share_gpu=False" in text
    assert "at most 2 ranks" in text and "set share_gpu to true" in text


def test_tensorflow_sees_one_and_takes_memory_as_needed():
    gpus = FakeGpus(UUIDS[:4])
    with gpus.installed():
        assert pin(launched(2, 4), False) == Pinned(2)
        assert gpus.seen == [2] and gpus.growth == {gpus.physical[2]: True}
        # A second session in the same process.
        gpus.has_started = True
        assert pin(launched(2, 4), False) == Pinned(2)


def test_what_the_script_has_chosen_stays(caplog):
    gpus = FakeGpus(UUIDS[:4], limited=(1,))
    gpus.visible = gpus.physical[1:2]
    with gpus.installed():
        assert pin(launched(3, 4), False) == Pinned(1)
        assert gpus.seen == [1] and not gpus.growth
        gpus.visible = gpus.physical[2:]
        gpus.growth[gpus.physical[3]] = False
        assert pin(launched(1, 2), False) == Pinned(3)
        assert gpus.seen == [3] and gpus.growth == {gpus.physical[3]: False}
        gpus.visible = []
        assert pin(launched(1, 2), False) == Pinned()
    assert not caplog.records


def test_tensorflow_has_started(caplog):
    caplog.set_level(logging.WARNING, "smp_tf")
    gpus = FakeGpus(UUIDS[:2], has_started=True)
    with gpus.installed():
        with pytest.raises(ConfigError, match=r"before smp\.init.*GPUs=0, 1,.*GPU=1"):
            pin(launched(1, 2), False)
        # It sees the GPU of rank 1 as well, and takes memory there.
        with pytest.raises(ConfigError, match="local_rank=0, local_size=2"):
            pin(launched(0, 2), False)
        assert not caplog.records
        # Alone it does no harm, but for the memory.
        assert pin(launched(0, 1), False) == Pinned(0)
    assert "takes all memory of the GPU" in caplog.text


def test_what_a_rank_tells():
    with FakeGpus(UUIDS[:2]).installed():
        assert pin_and_tell(launched(1, 2), False) == Pinned(1, "GPU-1", "Fake")
    with FakeGpus(()).installed():
        assert pin_and_tell(launched(1, 2), False) == Pinned()
    with FakeGpus(UUIDS[:2]).installed():
        told = pin_and_tell(launched(1, 4), False)
        assert told.ordinal is None and "GPUs=2" in told.refusal


def test_a_driver_that_does_not_tell(caplog):
    caplog.set_level(logging.WARNING, "smp_tf")
    with FakeGpus(UUIDS[:2], has_driver=False).installed():
        assert pin_and_tell(launched(1, 2), False) == Pinned(1)
    assert "rank 1: whether other ranks use the same GPU is not known" in caplog.text
    compare([Pinned(0), Pinned(0)], ["a", "a"], False)


def test_two_ranks_on_one_gpu():
    one, other = Pinned(0, "GPU-0", "H200"), Pinned(0, "GPU-1", "H200")
    hosts = ["a", "a", "b", "b"]
    compare([one, other, Pinned(), Pinned()], hosts, False)
    compare([one, one, other, other], hosts, True)
    with pytest.raises(ConfigError) as caught:
        compare([one, one, Pinned(), one], hosts, False)
    assert "`share_gpu`" in str(caught.value)
    assert "ranks 0, 1, 3 on host a: GPU-0 (H200); share_gpu=False" in str(caught.value)


def test_refusals_of_any_rank_are_told():
    same, other = Pinned(refusal="too few"), Pinned(refusal="too late")
    with pytest.raises(ConfigError, match="^ranks 0, 2: too few. rank 1: too late$"):
        compare([same, other, same, Pinned()], ["a"] * 4, True)


@pytest.mark.parametrize(
    ("file", "found"),
    [("nvidia0", True), ("dxg", True), ("nvidiactl", False), ("null", False)],
)
def test_files_of_a_driver(file, found, tmp_path: Path, monkeypatch):
    (tmp_path / file).touch()
    monkeypatch.setattr(pinning, "_DEVICES", tmp_path)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert pinning.may_have_gpus() is found
    for hidden in ("", "-1"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
        assert not pinning.may_have_gpus()
