"""Configuration: sources, defaults, and every error that is promised."""

import json
from dataclasses import asdict, fields
from pathlib import Path

import pytest

from smp_tf.config import Config, json_log, resolve
from smp_tf.config_keys import DEFAULTS, RULES
from smp_tf.errors import ConfigError


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch):
    for name in ("SMP_CONFIG", "SM_HP_MP_PARAMETERS"):
        monkeypatch.delenv(name, raising=False)


def fails(argument, world_size=2):
    """Return the text of the ConfigError that a configuration raises."""
    with pytest.raises(ConfigError) as caught:
        resolve(argument, world_size)
    return str(caught.value)


# Defaults.


def test_table_and_class_have_the_same_keys():
    keys = {field.name for field in fields(Config)}
    assert set(RULES) == keys
    dependent = {"partitions", "active_microbatches", "memory_weight"}
    assert keys - set(DEFAULTS) == dependent


def test_defaults():
    assert asdict(resolve(None, 4)) == {
        "partitions": 4,
        "microbatches": 1,
        "pipeline": "interleaved",
        "virtual_stages": 1,
        "schedule_file": None,
        "active_microbatches": 6,
        "optimize": "memory",
        "memory_weight": 0.8,
        "memory_limit_bytes": None,
        "partition_file": None,
        "profile": False,
        "auto_partition": True,
        "default_partition": 0,
        "contiguous": True,
        "placement_strategy": "cluster",
        "horovod": False,
        "xla": False,
        "tensor_parallel_degree": 1,
        "shard_optimizer_state": False,
        "offload_activations": False,
        "activation_loading_horizon": 4,
        "check_inputs": False,
        "share_gpu": False,
        "trace_dir": None,
        "timeout_s": 600.0,
    }


def test_defaults_follow_other_keys():
    config = resolve({"partitions": 2, "optimize": "speed"}, 8)
    assert (config.active_microbatches, config.memory_weight) == (4, 0.2)
    config = resolve({"memory_weight": 1, "optimize": "speed", "timeout_s": 5}, 1)
    assert (config.memory_weight, config.timeout_s) == (1.0, 5.0)
    assert isinstance(config.memory_weight, float)
    assert isinstance(config.timeout_s, float)


@pytest.mark.parametrize(
    ("given", "active"),
    [
        ({"partitions": 4}, 6),
        ({"partitions": 4, "pipeline": "simple"}, 6),
        ({"partitions": 4, "pipeline": "simple", "microbatches": 32}, 32),
        ({"partitions": 4, "pipeline": "zero_bubble", "microbatches": 32}, 6),
        ({"partitions": 8, "virtual_stages": 2}, 15),
        ({"partitions": 2, "virtual_stages": 2}, 4),
    ],
)
def test_microbatches_in_flight_follow_the_schedule(given, active):
    assert resolve(given, 8).active_microbatches == active


def test_config_is_frozen():
    with pytest.raises(AttributeError):
        resolve(None, 1).partitions = 2


# Sources.


def test_sources_in_order(monkeypatch):
    job = {"microbatches": 2, "pipeline": "simple"}
    monkeypatch.setenv("SM_HP_MP_PARAMETERS", json.dumps(job))
    assert resolve(None, 2).microbatches == 2
    monkeypatch.setenv("SMP_CONFIG", ' {"microbatches": 4, "timeout_s": 9}')
    assert resolve(None, 2).microbatches == 4
    config = resolve({"microbatches": 8}, 2)
    assert (config.microbatches, config.timeout_s) == (8, 9.0)
    assert config.pipeline == "simple"


def test_an_alias_is_overridden_by_a_stronger_source(monkeypatch):
    monkeypatch.setenv("SM_HP_MP_PARAMETERS", '{"pipeline_parallel_degree": 4}')
    assert resolve({"partitions": 2}, 4).partitions == 2
    assert resolve({}, 4).partitions == 4


def test_path_of_a_file(monkeypatch, tmp_path):
    path = tmp_path / "smp.json"
    path.write_text(json.dumps({"microbatches": 4}))
    monkeypatch.setenv("SMP_CONFIG", str(path))
    assert resolve(None, 2).microbatches == 4
    path.write_text('{"microbatches": 4,}')
    assert f"the file {path} that SMP_CONFIG names: not valid JSON" in fails(None)


def test_empty_variables_are_not_set(monkeypatch):
    monkeypatch.setenv("SMP_CONFIG", " ")
    monkeypatch.setenv("SM_HP_MP_PARAMETERS", "")
    assert resolve(None, 2) == resolve({}, 2)


@pytest.mark.parametrize("name", ["SMP_CONFIG", "SM_HP_MP_PARAMETERS"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"microbatches": }', ": not valid JSON; "),
        ('{"microbatches": 2, "microbatches": 4}', "`microbatches`: given twice, in "),
        ('{"microbatch": 2}', "`microbatch`: unknown; did you mean `microbatches`?"),
        ('{"microbatches": "2"}', "microbatches='2' of type str, in "),
    ],
)
def test_bad_text_is_named_with_its_source(monkeypatch, name, text, message):
    monkeypatch.setenv(name, text)
    error = fails(None)
    assert message in error
    assert name in error


def test_text_that_is_no_object(monkeypatch):
    monkeypatch.setenv("SM_HP_MP_PARAMETERS", "[1]")
    assert "SM_HP_MP_PARAMETERS: must be a JSON object" in fails(None)
    assert "must be a mapping of keys to values; config=[1] of type list" in fails([1])


def test_missing_file(monkeypatch):
    monkeypatch.setenv("SMP_CONFIG", "/nowhere/smp.json")
    error = fails(None)
    assert "SMP_CONFIG='/nowhere/smp.json', which cannot be read" in error
    assert "must hold a JSON object, starting with {, or the path" in error


def test_an_overridden_source_is_still_checked(monkeypatch):
    monkeypatch.setenv("SMP_CONFIG", '{"microbatches": 0}')
    assert "in SMP_CONFIG" in fails({"microbatches": 2})


# Keys.


@pytest.mark.parametrize(
    ("key", "meant"),
    [
        ("microbatch", "microbatches"),
        ("Microbatches", "microbatches"),
        ("placement-strategy", "placement_strategy"),
        ("num_partitions", "partitions"),
        ("pipeline_parallel_size", "pipeline_parallel_degree"),
        ("timeout", "timeout_s"),
    ],
)
def test_unknown_key_gets_the_nearest(key, meant):
    error = fails({key: 2})
    assert error.startswith(f"`{key}`: unknown; did you mean `{meant}`?")
    assert f"{key}=2, in the argument of smp.init()" in error


def test_unknown_key_with_nothing_near():
    error = fails({"qqq": None, "microbatches": 2})
    assert "`qqq`: unknown; known keys are activation_loading_horizon, " in error
    assert "`3`: unknown" in fails({3: 3})


@pytest.mark.parametrize(
    ("alias", "key", "value", "other"),
    [("pipeline_parallel_degree", "partitions", 1, 2), ("ddp", "horovod", False, True)],
)
def test_aliases(alias, key, value, other):
    assert getattr(resolve({alias: value}, 2), key) == value
    assert getattr(resolve({alias: value, key: value}, 2), key) == value
    error = fails({alias: value, key: other})
    assert f"{alias}={value}, {key}={other}" in error
    assert "give only one of them" in error


# Values.

INTEGERS = (
    "partitions",
    "microbatches",
    "virtual_stages",
    "active_microbatches",
    "tensor_parallel_degree",
    "activation_loading_horizon",
)
BOOLEANS = (
    "profile",
    "auto_partition",
    "contiguous",
    "horovod",
    "xla",
    "shard_optimizer_state",
    "offload_activations",
    "check_inputs",
)


@pytest.mark.parametrize("key", INTEGERS)
@pytest.mark.parametrize("value", [0, -1, 1.0, "2", True, None, [2]])
def test_integers(key, value):
    error = fails({key: value})
    assert error.startswith(f"`{key}`: must be an integer, at least 1; ")
    assert f"; {key}={value!r} of type {type(value).__name__}, in " in error


@pytest.mark.parametrize("value", [-1, True, None])
def test_default_partition_starts_at_zero(value):
    assert "must be an integer, at least 0" in fails({"default_partition": value})


@pytest.mark.parametrize("key", BOOLEANS)
@pytest.mark.parametrize("value", [0, 1, "true", None])
def test_booleans(key, value):
    assert f"`{key}`: must be true or false; {key}={value!r}" in fails({key: value})


@pytest.mark.parametrize("value", [-0.1, 1.1, float("nan"), "0.5", True, None, 10**400])
def test_memory_weight(value):
    assert "must be a number from 0.0 to 1.0" in fails({"memory_weight": value})


@pytest.mark.parametrize(
    "value", [0, -5, float("inf"), float("nan"), "9", False, 10**400]
)
def test_timeout(value):
    assert "must be a finite number of seconds above 0" in fails({"timeout_s": value})


@pytest.mark.parametrize("value", [0, -1, 1.0, "16GB", True])
def test_memory_limit(value):
    error = fails({"memory_limit_bytes": value})
    assert "must be an integer, at least 1, or null" in error
    for good in (1, 2**40, None):
        assert resolve({"memory_limit_bytes": good}, 2).memory_limit_bytes == good


@pytest.mark.parametrize("key", ["trace_dir", "partition_file"])
@pytest.mark.parametrize("value", ["", 3, b"/tmp", ["/tmp"]])
def test_paths(key, value):
    assert f"`{key}`: must be a path, or null" in fails({key: value})


def test_partition_file_is_a_path_as_text():
    for given in ("a/p.json", Path("a/p.json")):
        assert resolve({"partition_file": given}, 2).partition_file == "a/p.json"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("pipeline", "interleave", 'did you mean "interleaved"?'),
        ("pipeline", "1f1b", 'one of "interleaved", "simple", "zero_bubble", "auto"'),
        ("pipeline", None, "pipeline=None of type NoneType"),
        ("optimize", "Speed", 'did you mean "speed"?'),
        ("placement_strategy", "DPP", '"cluster", "spread", "DPT", "DTP", "PDT", '),
        ("placement_strategy", "DP", "placement_strategy='DP'"),
        ("placement_strategy", "clusters", 'did you mean "cluster"?'),
    ],
)
def test_words(key, value, message):
    error = fails({key: value})
    assert error.startswith(f"`{key}`: must be one of ")
    assert message in error


@pytest.mark.parametrize(
    "value", ["cluster", "spread", "DPT", "DTP", "PDT", "PTD", "TDP", "TPD"]
)
def test_every_placement(value):
    assert resolve({"placement_strategy": value}, 4).placement_strategy == value


def test_long_values_are_cut():
    assert len(fails({"pipeline": "x" * 10000})) < 600


# Combinations.


def test_world_size_must_be_a_multiple():
    error = fails({"partitions": 4}, world_size=6)
    assert "ranks=6, partitions=4, tensor_parallel_degree=1" in error
    assert "launch a multiple of 4 ranks (horovodrun -np 4 ...)" in error
    assert "or set partitions to one of 1, 2, 3, 6" in error
    error = fails({"partitions": 2, "tensor_parallel_degree": 2}, world_size=6)
    assert "launch a multiple of 4 ranks" in error
    assert "or set partitions to one of 1, 3" in error
    error = fails({"tensor_parallel_degree": 4}, world_size=2)
    assert "ranks=2, partitions=1, tensor_parallel_degree=4" in error
    assert "or set" not in error


def test_more_ranks_than_partitions():
    assert resolve({"partitions": 2}, 8).partitions == 2


def test_manual_partition_needs_a_default():
    error = fails({"auto_partition": False})
    assert error.startswith("`default_partition`: required when auto_partition is ")
    config = resolve({"auto_partition": False, "default_partition": 1}, 2)
    assert (config.auto_partition, config.default_partition) == (False, 1)


@pytest.mark.parametrize("auto_partition", [True, False])
def test_default_partition_in_range(auto_partition):
    error = fails({"auto_partition": auto_partition, "default_partition": 2})
    assert "default_partition=2, partitions=2; use a number from 0 to 1" in error


def test_a_file_and_a_hand_cannot_both_place():
    manual = {"auto_partition": False, "default_partition": 0}
    error = fails({**manual, "partition_file": "p.json"})
    assert error.startswith("`partition_file`: only one of the file and smp.partition")
    assert "partition_file='p.json', auto_partition=False; leave one" in error
    error = fails({**manual, "virtual_stages": 2})
    assert "virtual_stages=2, auto_partition=False; leave virtual_stages at 1" in error


def test_a_file_and_the_planner_cannot_both_schedule():
    error = fails({"schedule_file": "s.csv", "pipeline": "auto"})
    assert error.startswith("`schedule_file`: only one of the file and the planner")
    assert "schedule_file='s.csv'" in error


def test_optimizer_state_is_sharded_between_replicas_that_train_together():
    error = fails({"shard_optimizer_state": True})
    assert "shard_optimizer_state=True, horovod=False; set horovod to true" in error
    resolve({"shard_optimizer_state": True, "horovod": True}, 2)


def test_simple_keeps_all_microbatches():
    given = {"pipeline": "simple", "microbatches": 8, "active_microbatches": 4}
    error = fails(given)
    assert "active_microbatches=4, microbatches=8; leave it out" in error
    resolve({**given, "active_microbatches": 8}, 2)
    resolve({**given, "pipeline": "zero_bubble", "active_microbatches": 1}, 2)


# What is planned.


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("tensor_parallel_degree", 2),
        ("offload_activations", True),
        ("activation_loading_horizon", 5),
        ("check_inputs", True),
    ],
)
def test_planned_keys_say_so(key, value):
    with pytest.raises(NotImplementedError) as caught:
        resolve({key: value}, 2)
    assert str(caught.value).startswith(f"`{key}`: ")
    assert "planned and not yet available" in str(caught.value)


def test_planned_keys_accept_their_defaults():
    planned = {"check_inputs": False, "activation_loading_horizon": 4}
    assert resolve(planned, 2) == resolve(None, 2)


# Events as JSON.


def test_a_file_for_events(monkeypatch, tmp_path):
    monkeypatch.delenv("SMP_LOG_JSON", raising=False)
    assert json_log() is None
    monkeypatch.setenv("SMP_LOG_JSON", "")
    assert json_log() is None
    (tmp_path / "log.jsonl").write_text("kept\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SMP_LOG_JSON", "log.jsonl")
    assert json_log() == tmp_path / "log.jsonl"  # also where the script goes elsewhere
    assert (tmp_path / "log.jsonl").read_text() == "kept\n"


@pytest.mark.parametrize("name", [".", "nowhere/log.jsonl"])
def test_a_file_for_events_that_cannot_be_written(monkeypatch, tmp_path, name):
    path = str(tmp_path / name)
    monkeypatch.setenv("SMP_LOG_JSON", path)
    with pytest.raises(ConfigError, match="that rank 0 can append to; SMP_LOG_JSON="):
        json_log()
