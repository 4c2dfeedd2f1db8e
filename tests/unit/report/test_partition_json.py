"""The partition table as JSON, held against the plan."""

import json

import pytest

from smp_tf.config import resolve
from smp_tf.plan.plan_step import plan_step
from smp_tf.report.partition_json import partition_event
from tests.unit.plan.example_graphs import BATCH, WIDTH, chain

WEIGHT = 4 * WIDTH * WIDTH
ROWS = 4 * BATCH * WIDTH


def test_it_has_all_figures_without_rounding() -> None:
    config = resolve({"partitions": 2, "microbatches": 4, "pipeline": "simple"}, 2)
    plan = plan_step(chain(4), config, {}, {})
    event = json.loads(json.dumps(partition_event("train", plan, "now")))
    ranks, cuts = event.pop("ranks"), event.pop("cuts")
    assert event == {
        "event": "partition",
        "time": "now",
        "step": "train",
        "partitions": 2,
        "microbatches": 4,
        "pipeline": "simple",
        "seconds": plan.report.seconds,
        "bubble": plan.report.bubble,
    }
    assert [rank["rank"] for rank in ranks] == [0, 1]
    assert sum((rank["layers"] for rank in ranks), []) == [
        f"model/dense_{i}" for i in range(4)
    ]
    for rank in ranks:
        size = WEIGHT * len(rank["layers"])
        assert rank["weight_bytes"] == rank["gradient_bytes"] == size
        assert rank["optimizer_bytes"] == 2 * size
        parts = ("weight", "gradient", "optimizer", "activation", "update", "allocator")
        assert rank["total_bytes"] == sum(rank[f"{part}_bytes"] for part in parts)
        assert rank["allocator_bytes"] == round(0.12 * rank["activation_bytes"])
        assert rank["activation_bytes"] >= 4 * ROWS
    assert sum(rank["compute_share"] for rank in ranks) == pytest.approx(1.0)
    crossing = [cut for cut in cuts if cut["shape"]]
    assert [(cut["source"], cut["peer"]) for cut in crossing] == [(0, 1), (1, 0)]
    for cut in crossing:
        assert cut["dtype"] == "float32" and cut["shape"] == [BATCH, WIDTH]
        assert cut["bytes_per_step"] == 4 * ROWS
    assert crossing[0]["name"].startswith("dense_")
