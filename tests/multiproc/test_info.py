"""``python -m smp_tf info`` in a job: rank 0 tells for all."""

import os
from typing import Any

from smp_tf.report.info import Info, info_text
from tests.ranks import run_ranks


def _info() -> list[Any]:
    """What each rank would print: of a job, then of one that cannot meet."""
    from smp_tf.launch import launch
    from smp_tf.runtime import facts, session

    found: list[Any] = [facts.gather_job()]
    if launch().rank == 1:
        os.environ["SMP_CONFIG"] = '{"microbatches": 4}'
    found.append(facts.gather_job())
    assert not session.is_initialized()
    return found


def test_rank_0_tells() -> None:
    (job, failed), *others = run_ranks(3, _info)
    assert others == [[None, None]] * 2
    assert isinstance(job, Info) and not job.why_no_job
    assert [each.rank for each in job.ranks] == [0, 1, 2]
    assert [pair.ranks for pair in job.pairs] == [(0, 1), (0, 2), (1, 2)]
    assert all(pair.messages and pair.watch for pair in job.pairs)
    assert {pair.gpus for pair in job.pairs} == {"no rank has a GPU"}
    assert not job.differences()
    assert "1 and 2" in info_text(job)
    assert not failed.ranks and "`microbatches`: 1 on ranks 0, 2" in failed.why_no_job
    assert failed.parts == job.parts
