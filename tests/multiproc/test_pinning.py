"""``smp.init`` gives each rank a GPU, or fails on every one. The GPUs are fakes."""

import logging
from typing import Any, NamedTuple

import smp_tf as smp
from smp_tf.runtime import session
from tests.ranks import run_ranks


class Case(NamedTuple):
    """What each of two ranks sees: arguments of ``FakeGpus``."""

    seen: tuple[dict[str, Any], dict[str, Any]]
    share_gpu: bool = False


def uuids(*names: str, **others: Any) -> dict[str, Any]:
    return {"uuids": tuple(f"GPU-{name}" for name in names), **others}


CASES = {
    "both see both": Case((uuids("a", "b"), uuids("a", "b"))),
    "one each": Case((uuids("a"), uuids("b"))),
    "one for both": Case((uuids("a"), uuids("a"))),
    "one to share": Case((uuids("a"), uuids("a")), share_gpu=True),
    "one has none": Case((uuids("a"), uuids())),
    "one has started": Case((uuids("a", "b"), uuids("a", "b", has_started=True))),
    "not known": Case((uuids("a"), uuids("a", has_driver=False))),
}


def _try() -> dict[str, Any]:
    """Case -> the error, or (GPU, all that TensorFlow sees, warnings)."""
    from smp_tf.launch import launch
    from tests.fake_gpus import FakeGpus

    rank = launch().rank
    warnings: list[str] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: warnings.append(record.getMessage())  # type: ignore
    logging.getLogger("smp_tf").addHandler(handler)
    results: dict[str, Any] = {}
    for name, case in CASES.items():
        with FakeGpus(**case.seen[rank]).installed() as gpus:
            try:
                smp.init({"share_gpu": case.share_gpu, "timeout_s": 30.0})
            except smp.ConfigError as error:
                results[name] = str(error)
                continue
            smp.barrier()
            gpu = session.current("rank").gpu
            results[name] = (gpu.ordinal, gpu.uuid, gpus.seen, [*warnings])
            warnings.clear()
            smp.shutdown()
    return results


def test_each_rank_has_its_own_or_all_fail() -> None:
    first, second = run_ranks(2, _try)
    assert first["both see both"] == (0, "GPU-a", [0], [])
    assert second["both see both"] == (1, "GPU-b", [1], [])
    assert first["one each"] == (0, "GPU-a", [0], [])
    assert second["one each"] == (0, "GPU-b", [0], [])

    text = "ranks 0, 1 on host localhost: GPU-a (Fake); share_gpu=False"
    assert first["one for both"] == second["one for both"]
    assert text in first["one for both"]
    assert first["one to share"] == second["one to share"] == (0, "GPU-a", [0], [])

    assert first["one has none"] == (0, "GPU-a", [0], [])
    assert second["one has none"] == (None, "", [], [])

    assert first["one has started"] == second["one has started"]
    assert first["one has started"].startswith("rank 1: TensorFlow was in use before")

    assert first["not known"] == (0, "GPU-a", [0], [])
    *gpu, (warning,) = second["not known"]
    assert gpu == [0, "", [0]] and "is not known" in warning
