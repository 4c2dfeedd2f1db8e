"""What is said of GPUs, from rows as the kernel library gives them."""

import pytest

from smp_tf.transport import nccl

ROWS = (
    ("cuda", "12040", "/lib/libcuda.so.1", ""),
    ("nccl", "23003", "/lib/libnccl.so.2", ""),
    ("gpu", "0", "NVIDIA H200", "GPU-1", "00000000:01:00.0", "150754820096"),
    ("gpu", "1", "NVIDIA H200", "GPU-2", "00000000:02:00.0", "150754820096"),
)


def test_facts(monkeypatch):
    monkeypatch.setattr(nccl, "_rows", lambda: ROWS)
    assert nccl.driver() == ("12.4", "/lib/libcuda.so.1", "")
    assert nccl.found() == ("2.30.3", "/lib/libnccl.so.2", "")
    assert [gpu.uuid for gpu in nccl.gpus()] == ["GPU-1", "GPU-2"]
    assert nccl.gpus()[1].bytes_total == 150754820096


@pytest.mark.parametrize(
    ("number", "version"), [(0, ""), (2708, "2.7.8"), (21304, "2.13.4")]
)
def test_both_forms_of_ncclGetVersion(number, version, monkeypatch):
    rows = (("nccl", str(number), "", "gone"),)
    monkeypatch.setattr(nccl, "_rows", lambda: rows)
    assert nccl.found() == (version, "", "gone")


def test_this_machine_is_looked_at():
    """Whatever there is: a reason, or something usable."""
    assert bool(nccl.found().why_not) != bool(nccl.found().version)
    assert bool(nccl.driver().why_not) or nccl.gpus()


def test_kernels_for_gpus_are_in_the_library():
    """Also in one that was built, and is loaded, without CUDA and NCCL."""
    from tensorflow.python.framework import kernels

    from smp_tf.transport import ops

    ops.load()
    for name in ("SmpSendPost", "SmpRecvPost", "SmpRecvWait"):
        found = kernels.get_registered_kernels_for_op(name).kernel
        assert {each.device_type for each in found} == {"CPU", "GPU"}
    for name in ("SmpSumPost", "SmpSumWait"):
        found = kernels.get_registered_kernels_for_op(name).kernel
        assert {each.device_type for each in found} == {"GPU"}
