"""``smp.init`` divides the cores of a host between its ranks."""

import logging
import os
from typing import Any

import smp_tf as smp
from tests.ranks import run_ranks

NOT_CHOSEN = {"TF_NUM_INTRAOP_THREADS": "0", "TF_NUM_INTEROP_THREADS": "0"}


def _threads(
    chosen: dict[int, int], used: int | None, config: dict[str, Any] = {}
) -> tuple[int, int, list[str]]:
    """Intra-op and inter-op threads after init, and the warnings that it gave."""
    import tensorflow as tf

    rank = int(os.environ["HOROVOD_RANK"])
    os.sched_setaffinity(0, os.sched_getaffinity(os.getppid()))
    if rank in chosen:
        tf.config.threading.set_intra_op_parallelism_threads(chosen[rank])
    if rank == used:
        tf.constant(1)  # makes TensorFlow's context
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore
    logging.getLogger("smp_tf").addHandler(handler)
    smp.init(config)
    pools = tf.config.threading
    return (
        pools.get_intra_op_parallelism_threads(),
        pools.get_inter_op_parallelism_threads(),
        warnings,
    )


def test_cores_are_divided_unless_the_user_has_chosen() -> None:
    results: list[Any] = run_ranks(3, _threads, {1: 5}, 2, env=NOT_CHOSEN)
    share = max(1, len(os.sched_getaffinity(0)) // 3)
    assert results[0] == (share, share, [])
    assert results[1] == (5, share, [])
    intra, inter, (warning,) = results[2]
    assert (intra, inter) == (0, 0)
    assert "TensorFlow was in use before smp.init()" in warning
    assert f"threads={share}" in warning


def test_replicas_have_a_thread_to_average_in() -> None:
    replicas = {"partitions": 1, "horovod": True}
    results = run_ranks(2, _threads, {}, None, replicas, env=NOT_CHOSEN)
    share = max(1, len(os.sched_getaffinity(0)) // 2)
    assert results == [(share, max(2, share), [])] * 2
    chosen = {**NOT_CHOSEN, "TF_NUM_INTEROP_THREADS": "1"}
    for _, inter, _ in run_ranks(2, _threads, {}, None, replicas, env=chosen):
        assert inter in (0, 1)  # as TensorFlow reads it from there
