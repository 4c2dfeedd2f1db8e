"""The files that ranks keep to themselves."""

import json
import pathlib
import random
from typing import Any

import pytest

import smp_tf as smp
from smp_tf.checkpoint import rank_state
from smp_tf.runtime.random_counters import counters_of


class Model:
    """What counters belong to: any object."""


SEEN = {"step(x float32[4]) x 2 #0": {"0 RandomUniform": [512, 1, 2]}}
OTHER = {"step(x float32[4]) x 2 #0": {"3 TruncatedNormal": [256, 3, 4]}}


def written(folder: pathlib.Path, rank: int, states: Any) -> pathlib.Path:
    model, prefix = Model(), folder / f"ckpt-1.rank_{rank}"
    counters_of(model).take_over(states)
    rank_state.write(prefix, {}, {"nets/a": model})
    return prefix


def test_counters_of_all_ranks_make_one_model(tmp_path: pathlib.Path) -> None:
    prefixes = [written(tmp_path, i, each) for i, each in enumerate((SEEN, OTHER, {}))]
    found = rank_state.counters_in(prefixes)
    (trace,) = SEEN
    assert found == {"nets/a": {trace: {**SEEN[trace], **OTHER[trace]}}}
    same, unknown = Model(), Model()
    counters_of(unknown).take_over(SEEN)
    rank_state.take_over_counters(found, {"nets/a": same, "nets/b": unknown})
    assert counters_of(same).states() == found["nets/a"]
    assert counters_of(unknown).states() == {}  # had none when it was saved


def test_a_file_from_before_there_were_counters(tmp_path: pathlib.Path) -> None:
    prefix = written(tmp_path, 0, SEEN)
    file = tmp_path / "ckpt-1.rank_0.json"
    file.write_text(json.dumps(json.loads(file.read_text())[:4]))
    expected = random.random()
    rank_state.RandomStates(prefix).take_over()
    assert random.random() == expected
    assert rank_state.counters_in([prefix]) is None
    model = Model()
    counters_of(model).take_over(SEEN)
    rank_state.take_over_counters(None, {"nets/a": model})
    assert counters_of(model).states() == SEEN


@pytest.mark.parametrize("text", ["", "[1, 2", "{}", "[1, 2, 3, 4, 5]"])
def test_a_file_that_is_none(tmp_path: pathlib.Path, text: str) -> None:
    prefix = tmp_path / "ckpt-1.rank_0"
    pathlib.Path(f"{prefix}.json").write_text(text)
    with pytest.raises(smp.ConfigError, match="ckpt-1.rank_0.json.*restore another"):
        rank_state.counters_in([prefix])


def test_the_ranks_of_a_replica() -> None:
    files = [
        f"mp_rank_{mp_rank}/ckpt-2.rank_{rank}.{ending}"
        for rank, mp_rank in enumerate((0, 0, 1, 1))
        for ending in ("json", "iterators.index")
    ]
    files += ["mp_rank_0/ckpt-2.index", "mp_rank_0/ckpt-2.manifest.json"]
    assert rank_state.of_replica(files, 0) == [(0, 0), (1, 2)]
    assert rank_state.of_replica(files, 1) == [(0, 1), (1, 3)]
    assert rank_state.of_replica(files, 2) == [(0, 0), (1, 2)]
