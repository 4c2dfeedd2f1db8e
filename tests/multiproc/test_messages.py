"""Messages between real processes over the real transport."""

import statistics
import time
from typing import Any

import numpy as np
import pytest

import smp_tf as smp
from tests.ranks import ranks, run_ranks

ROUNDS = 200


def _echo(obj: Any) -> Any:
    """Rank 0: the object after a trip to rank 1 and back."""
    if smp.rank() == 0:
        smp.send(obj, 1, smp.WORLD_RANK)
        return smp.recv_from(1, smp.WORLD_RANK)
    smp.send(smp.recv_from(0, smp.WORLD_RANK), 0, smp.WORLD_RANK)
    return obj


@ranks(2)
def test_objects_arrive_as_they_were_sent() -> None:
    import tensorflow as tf

    smp.init()
    for obj in (None, {"a": [1, "two"]}, b"x" * 100_000, list(range(50_000))):
        assert _echo(obj) == obj
    for size in (0, 1, 1023, 1024, 1025, 5_000_000):
        array = np.arange(size, dtype=np.float32)
        result = _echo({"array": array, "n": size})
        np.testing.assert_array_equal(result["array"], array)
    numbers = tf.reshape(tf.range(6000), [60, 100])
    for dtype in (tf.float32, tf.bfloat16, tf.float16, tf.int64, tf.bool, tf.complex64):
        tensor = tf.cast(numbers, dtype)
        result = _echo(tensor)
        assert isinstance(result, tf.Tensor)
        assert result.dtype == dtype and result.shape == [60, 100]
        assert tf.reduce_all(result == tensor)
    words = _echo(tf.constant([["a", "bc"], ["", "\u00e9"]]))
    assert words.dtype == tf.string and words[1, 1].numpy() == "\u00e9".encode()
    assert _echo(tf.constant(7)).shape == []
    variable = _echo(tf.Variable(tf.ones([3000])))
    assert isinstance(variable, tf.Variable) and variable.shape == [3000]
    pieces = _echo([tf.fill([2000], i) for i in range(20)])
    assert [int(piece[0]) for piece in pieces] == list(range(20))


@ranks(2)
def test_send_returns_when_the_receive_was_made() -> None:
    smp.init()
    for obj in ("small", np.zeros(2_000_000)):
        smp.barrier()
        started = time.monotonic()
        if smp.rank() == 0:
            smp.send(obj, 1, smp.PP_RANK)
            assert 0.3 < time.monotonic() - started < 10
        else:
            time.sleep(0.4)
            smp.recv_from(0, smp.PP_RANK)


@ranks(2)
def test_sessions_follow_one_another() -> None:
    for epoch in range(3):
        smp.init({"microbatches": epoch + 1})
        assert smp.allgather((epoch, smp.rank()), smp.WORLD) == [(epoch, 0), (epoch, 1)]
        smp.shutdown()
        with pytest.raises(smp.NotInitializedError):
            smp.rank()


def _groups() -> tuple[dict[str, Any], float]:
    smp.init({"partitions": 2})
    rank = smp.rank()
    found: dict[str, Any] = {
        group.name: smp.allgather(rank, group) for group in smp.CommGroup
    }
    mp_group, dp_group = smp.get_mp_group(), smp.get_dp_group()
    assert found["MP_GROUP"] == mp_group and found["DP_GROUP"] == dp_group
    assert (mp_group[smp.mp_rank()], dp_group[smp.dp_rank()]) == (rank, rank)
    if smp.mp_rank() == 1:
        smp.broadcast(f"mp_rank 1 of {mp_group}", smp.MP_GROUP)
    else:
        found["text"] = smp.recv_from(1, smp.MP_RANK)
    for barrier in (smp.barrier, smp.mp_barrier, smp.dp_barrier, smp.pp_barrier):
        barrier()
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        smp.allgather(rank, smp.WORLD)
        seconds.append(time.perf_counter() - started)
    return found, statistics.median(seconds)


def test_groups_of_four_ranks(record_property: Any) -> None:
    results = run_ranks(4, _groups)
    for rank, (found, _) in enumerate(results):
        assert found["WORLD"] == [0, 1, 2, 3]
        assert found["PP_GROUP"] == found["MP_GROUP"] == [[0, 1], [2, 3]][rank // 2]
        assert found["DP_GROUP"] == found["RDP_GROUP"] == [[0, 2], [1, 3]][rank % 2]
        assert found["TP_GROUP"] == [rank]
        assert found.get("text") == [
            "mp_rank 1 of [0, 1]",
            None,
            "mp_rank 1 of [2, 3]",
            None,
        ][rank]
    latency = max(seconds for _, seconds in results)
    record_property("allgather_us", latency * 1e6)
    assert latency < 0.05  # usually a few hundred microseconds


@ranks(3)
def test_everybody_sees_large_objects_of_all() -> None:
    smp.init()
    mine = np.full(1_000_000, smp.rank(), np.float32)
    for _ in range(5):
        arrays = smp.allgather(mine, smp.WORLD)
        assert [float(array.mean()) for array in arrays] == [0, 1, 2]
        assert [float(array.std()) for array in arrays] == [0, 0, 0]
