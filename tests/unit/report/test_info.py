"""What ``python -m smp_tf info`` prints, from facts written here."""

import json

from smp_tf.report.info import Info, Pair, Part, RankInfo, info_json, info_text

UCX = Part("UCX", (("version", "1.22.0"), ("path", "/lib/libucp.so.0")))
NCCL = Part("NCCL", (), "no GPU (there is no driver)")
GPU = Part("GPU 0", (("name", "H200"), ("memory_bytes", 3 * 2**20), ("uuid", "GPU-a")))
HOROVOD = Part("Horovod", (("version", "0.28.1"), ("gloo", True), ("mpi", False)))
ALONE = Info((UCX, NCCL, HOROVOD))
JOB = Info(
    (UCX, GPU),
    (
        RankInfo(0, "a", "0 H200 GPU-a", (UCX, GPU)),
        RankInfo(1, "b", "", (UCX, NCCL)),
    ),
    (Pair((0, 1), "rc_mlx5", "tcp/lo", "one of them has no GPU"),),
)


def test_one_line_a_part():
    assert info_text(ALONE).splitlines() == [
        "UCX      1.22.0; path /lib/libucp.so.0",
        "NCCL     not used: no GPU (there is no driver)",
        "Horovod  0.28.1; gloo yes; mpi no",
    ]


def test_a_job_has_ranks_pairs_and_differences():
    assert info_text(JOB).splitlines() == [
        "UCX    1.22.0; path /lib/libucp.so.0",
        "GPU 0  H200; memory 3.0 MiB; uuid GPU-a",
        "",
        "not as on rank 0",
        "rank 1  NCCL  not used: no GPU (there is no driver)",
        "",
        "rank  host  GPU",
        "0     a     0 H200 GPU-a",
        "1     b     -",
        "",
        "ranks    messages  watch   GPU to GPU",
        "0 and 1  rc_mlx5   tcp/lo  one of them has no GPU",
    ]


def test_ranks_that_did_not_meet():
    lines = info_text(Info((UCX,), why_no_job="rank 1 died")).splitlines()
    assert lines[-1] == "the ranks did not meet: rank 1 died"


def test_json_has_the_same():
    alone = json.loads(info_json(ALONE))
    assert alone["parts"]["UCX"] == {
        "version": "1.22.0",
        "path": "/lib/libucp.so.0",
        "why_not": "",
    }
    assert alone["parts"]["Horovod"]["gloo"] is True
    assert alone["ranks"] == alone["pairs"] == alone["differences"] == []
    job = json.loads(info_json(JOB))
    assert job["parts"]["GPU 0"]["memory_bytes"] == 3 * 2**20
    assert job["ranks"][1] == {"rank": 1, "host": "b", "gpu": ""}
    (pair,) = job["pairs"]
    assert pair["ranks"] == [0, 1] and pair["gpus"] == "one of them has no GPU"
    (difference,) = job["differences"]
    assert difference["rank"] == 1 and difference["part"] == "NCCL"
