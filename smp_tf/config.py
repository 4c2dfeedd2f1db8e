"""The configuration of a job, and how it was launched.

The only module of smp_tf that reads environment variables. Settings come, key by
key, from the first source that has them:

    1. the argument of smp.init()
    2. SMP_CONFIG               JSON text, or the path of a JSON file
    3. SM_HP_MP_PARAMETERS      JSON text, what a SageMaker job sets
    4. defaults

Each source is checked by itself, so an error names the source it is in; then the
whole is checked for combinations that cannot work.
"""

from __future__ import annotations

import difflib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smp_tf.config_keys import ALIASES, DEFAULTS, LATER, RULES, Rule
from smp_tf.errors import ConfigError

__all__ = [
    "Config",
    "Launch",
    "Threads",
    "json_log",
    "launch",
    "resolve",
    "threads_requested",
]


@dataclass(frozen=True)
class Config:
    """Every setting of a job, resolved. Only `resolve` makes one.

    `resolve` documents where values come from; the specification has one line on
    the meaning of each key.
    """

    partitions: int
    microbatches: int
    pipeline: str
    virtual_stages: int
    schedule_file: str | None
    active_microbatches: int
    optimize: str
    memory_weight: float
    memory_limit_bytes: int | None
    partition_file: str | None
    profile: bool
    auto_partition: bool
    default_partition: int
    contiguous: bool
    placement_strategy: str
    horovod: bool
    xla: bool
    tensor_parallel_degree: int
    shard_optimizer_state: bool
    offload_activations: bool
    activation_loading_horizon: int
    check_inputs: bool
    trace_dir: str | None
    timeout_s: float


def resolve(argument: Mapping[str, object] | None, world_size: int) -> Config:
    """Resolve the configuration of a job of `world_size` ranks.

    Args:
        argument: what the caller of smp.init() gave, if anything.
        world_size: number of ranks in the job.

    Raises:
        ConfigError: unknown key, wrong type or value, impossible combination, or
            text that is no JSON object; names key, value, source and remedy.
        NotImplementedError: a key that is only planned is set to something else
            than its default; names the key.
    """
    merged: dict[str, Any] = {}
    for source, given in _sources(argument):
        for key, value in _accept_all(given, source).items():
            merged.setdefault(key, value)
    if not merged.get("auto_partition", True) and "default_partition" not in merged:
        raise ConfigError(
            "`default_partition`: required when auto_partition is false; "
            "auto_partition=False; set default_partition to the partition of "
            "operations outside every smp.partition, 0 for example"
        )
    config = _with_defaults(merged, world_size)
    _check_together(config, world_size)
    _check_available(config)
    return config


def _sources(
    argument: Mapping[str, object] | None,
) -> Iterable[tuple[str, Mapping[Any, object]]]:
    """Yield (where, settings) of every source that is there, strongest first."""
    if argument is not None:
        if not isinstance(argument, Mapping):
            raise ConfigError(
                "the argument of smp.init() must be a mapping of keys to values; "
                f"config={_show(argument)} of type {type(argument).__name__}"
            )
        yield "the argument of smp.init()", argument
    text = os.environ.get("SMP_CONFIG", "").strip()
    if text.startswith("{"):
        yield "SMP_CONFIG", _parse(text, "SMP_CONFIG")
    elif text:
        yield _read_file(text)
    text = os.environ.get("SM_HP_MP_PARAMETERS", "").strip()
    if text:
        yield "SM_HP_MP_PARAMETERS", _parse(text, "SM_HP_MP_PARAMETERS")


def _read_file(name: str) -> tuple[str, Mapping[Any, object]]:
    source = f"the file {name} that SMP_CONFIG names"
    try:
        text = Path(name).expanduser().read_text(encoding="utf-8")
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            "SMP_CONFIG must hold a JSON object, starting with {, or the path of a "
            f"file that does; SMP_CONFIG={_show(name)}, which cannot be read: {error}"
        ) from None
    return source, _parse(text, source)


def _parse(text: str, source: str) -> Mapping[Any, object]:
    def without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
        found = dict(pairs)
        if len(found) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise ConfigError(f"`{twice}`: given twice, in {source}")
        return found

    try:
        found = json.loads(text, object_pairs_hook=without_duplicates)
    except ValueError as error:
        raise ConfigError(
            f"{source}: not valid JSON; {error}; text={_show(text)}; "
            'write for example {"partitions": 2, "microbatches": 4}'
        ) from None
    if not isinstance(found, dict):
        raise ConfigError(
            f"{source}: must be a JSON object of keys and values; text={_show(text)}"
        )
    return found


def _accept_all(given: Mapping[Any, object], source: str) -> dict[str, Any]:
    """Check every key and value of one source; aliases become canonical keys."""
    accepted: dict[str, Any] = {}
    spelled: dict[str, str] = {}
    for name, value in given.items():
        if name not in RULES and name not in ALIASES:
            raise ConfigError(
                f"`{name}`: unknown; {_suggest_key(name)}; "
                f"{name}={_show(value)}, in {source}"
            )
        key = ALIASES.get(name, name)
        value = _accept(name, value, RULES[key], source)
        if key in accepted and accepted[key] != value:
            raise ConfigError(
                f"`{name}`: an alias of the same setting has another value; "
                f"{spelled[key]}={_show(accepted[key])}, {name}={_show(value)}, in "
                f"{source}; give only one of them"
            )
        accepted[key] = value
        spelled[key] = name
    return accepted


def _accept(name: str, value: object, rule: Rule, source: str) -> Any:
    try:
        return rule.accept(value)
    except (ValueError, OverflowError):
        pass
    hint = ""
    if isinstance(value, str):
        near = difflib.get_close_matches(value, rule.words, n=1)
        hint = f'; did you mean "{near[0]}"?' if near else ""
    raise ConfigError(
        f"`{name}`: must be {rule.allowed}; {name}={_show(value)} of type "
        f"{type(value).__name__}, in {source}{hint}"
    )


def _suggest_key(name: object) -> str:
    known = [*RULES, *ALIASES]
    spelled = str(name).strip().lower().replace("-", "_")
    near = difflib.get_close_matches(spelled, known, n=1)
    if near:
        return f"did you mean `{near[0]}`?"
    return f"known keys are {', '.join(sorted(known))}"


def _with_defaults(merged: Mapping[str, Any], world_size: int) -> Config:
    values = {**DEFAULTS, **merged}
    degree = values["tensor_parallel_degree"]
    # Where this does not divide, _check_together says so.
    values.setdefault("partitions", max(world_size // degree, 1))
    values.setdefault("active_microbatches", _default_active(values))
    values.setdefault("memory_weight", 0.8 if values["optimize"] == "memory" else 0.2)
    return Config(**values)


def _default_active(values: Mapping[str, Any]) -> int:
    """Microbatches in flight that a schedule may need to be as fast as it can be."""
    partitions: int = values["partitions"]
    if values["pipeline"] == "simple":
        return max(int(values["microbatches"]), partitions + 2)
    if values["virtual_stages"] == 1:
        return partitions + 2
    # Megatron-LM's warm-up (arXiv 2104.04473, section 2.2) begins so many on rank 0.
    return max(partitions + 2, 2 * partitions - 1)


def _check_together(config: Config, world_size: int) -> None:
    """Check what no key can be blamed for alone."""
    degree = config.tensor_parallel_degree
    needed = config.partitions * degree
    if world_size % needed:
        fitting = [
            str(n)
            for n in range(1, world_size // degree + 1)
            if world_size % (n * degree) == 0
        ]
        remedy = f"launch a multiple of {needed} ranks (horovodrun -np {needed} ...)"
        if fitting:
            remedy += f", or set partitions to one of {', '.join(fitting)}"
        raise ConfigError(
            "`partitions`: the number of ranks must be a multiple of partitions x "
            f"tensor_parallel_degree; ranks={world_size}, "
            f"partitions={config.partitions}, tensor_parallel_degree={degree}; "
            f"{remedy}"
        )
    if config.default_partition >= config.partitions:
        raise ConfigError(
            "`default_partition`: there is no such partition; "
            f"default_partition={config.default_partition}, "
            f"partitions={config.partitions}; "
            f"use a number from 0 to {config.partitions - 1}"
        )
    if config.virtual_stages > 1 and not config.auto_partition:
        raise ConfigError(
            "`virtual_stages`: only one of it and smp.partition can decide which "
            f"pieces a rank has; virtual_stages={config.virtual_stages}, "
            "auto_partition=False; leave virtual_stages at 1: a partition that the "
            "contexts come back to has several pieces"
        )
    if (
        config.pipeline == "simple"
        and config.active_microbatches < config.microbatches
    ):
        raise ConfigError(
            "`active_microbatches`: the simple schedule keeps all microbatches until "
            "the last forward is done; "
            f"active_microbatches={config.active_microbatches}, "
            f"microbatches={config.microbatches}; "
            'leave it out, or use pipeline="interleaved" or "zero_bubble"'
        )
    if config.pipeline == "auto" and config.schedule_file is not None:
        raise ConfigError(
            "`schedule_file`: only one of the file and the planner can decide; "
            f'schedule_file={_show(config.schedule_file)}, pipeline="auto"; '
            "set pipeline to the one that the file was made for"
        )
    if config.partition_file is not None and not config.auto_partition:
        raise ConfigError(
            "`partition_file`: only one of the file and smp.partition can decide; "
            f"partition_file={_show(config.partition_file)}, auto_partition=False; "
            "leave one of them out"
        )


def _check_available(config: Config) -> None:
    """Refuse what is planned but not built."""
    for key, (built, feature) in LATER.items():
        value = getattr(config, key)
        if value != built:
            raise NotImplementedError(
                f"`{key}`: {feature} is planned and not yet available; "
                f"{key}={_show(value)}; leave it at {_show(built)}"
            )


def _show(value: object) -> str:
    """Print a value as the user wrote it, but never a page of it."""
    text = repr(value)
    return text if len(text) <= 200 else text[:200] + "..."


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        rank, size: this process among all of the job.
        local_rank, local_size: this process among those of its host.
        hostname: the host's name as the launcher knows it.
        store_host, store_port: the launcher's key-value store; None without a
            launcher.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    hostname: str
    store_host: str | None
    store_port: int | None


_LAUNCHER_NUMBERS = (
    "HOROVOD_RANK",
    "HOROVOD_SIZE",
    "HOROVOD_LOCAL_RANK",
    "HOROVOD_LOCAL_SIZE",
    "HOROVOD_GLOO_RENDEZVOUS_PORT",
)
_LAUNCHER_WORDS = ("HOROVOD_HOSTNAME", "HOROVOD_GLOO_RENDEZVOUS_ADDR")
# What the process starters of Open MPI, and of MPICH and its relatives, set.
_MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE")


def launch() -> Launch:
    """Read how this process was started; alone when no launcher started it.

    Raises:
        ConfigError: MPI started several processes, or the launcher's variables
            are incomplete or not numbers; names the variable.
    """
    if "HOROVOD_RANK" not in os.environ:
        _refuse_mpi()
        return Launch(0, 1, 0, 1, "localhost", None, None)
    for name in (*_LAUNCHER_NUMBERS, *_LAUNCHER_WORDS):
        if name not in os.environ:
            raise ConfigError(
                f"{name}: not set, although HOROVOD_RANK="
                f"{os.environ['HOROVOD_RANK']} is; start the job with "
                "`horovodrun --gloo -np N python script.py`"
            )
    rank, size, local_rank, local_size, port = map(_number_of, _LAUNCHER_NUMBERS)
    if not (0 <= rank < size and 0 <= local_rank < local_size <= size):
        raise ConfigError(
            "the launcher's variables do not fit together; "
            f"HOROVOD_RANK={rank}, HOROVOD_SIZE={size}, "
            f"HOROVOD_LOCAL_RANK={local_rank}, HOROVOD_LOCAL_SIZE={local_size}"
        )
    hostname, store_host = (os.environ[name] for name in _LAUNCHER_WORDS)
    return Launch(rank, size, local_rank, local_size, hostname, store_host, port)


def _number_of(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ConfigError(
            f"{name}: must be an integer; {name}={_show(os.environ[name])}"
        ) from None


def _refuse_mpi() -> None:
    for name in _MPI_SIZES:
        text = os.environ.get(name, "")
        if text.isdecimal() and int(text) > 1:
            raise ConfigError(
                f"MPI started this job, which is not supported yet; {name}={text}; "
                "start it with `horovodrun --gloo -np N python script.py`"
            )


def json_log() -> Path | None:
    """Where SMP_LOG_JSON asks for events as JSON, one a line; None if it does not.

    Raises:
        ConfigError: nothing can be written there.
    """
    name = os.environ.get("SMP_LOG_JSON", "")
    if not name:
        return None
    try:
        path = Path(name).expanduser().absolute()
        path.open("a").close()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(
            "SMP_LOG_JSON must name a file that rank 0 can append to; "
            f"SMP_LOG_JSON={_show(name)}: {error}"
        ) from None
    return path


@dataclass(frozen=True)
class Threads:
    """Thread counts that the user chose for TensorFlow; None where not chosen."""

    intra_op: int | None
    inter_op: int | None


def threads_requested() -> Threads:
    """Read the thread counts that TensorFlow itself takes from the environment.

    What is no positive integer counts as not chosen, as it does for TensorFlow.
    """

    def positive(name: str) -> int | None:
        text = os.environ.get(name, "").strip()
        return int(text) if text.isdecimal() and int(text) > 0 else None

    return Threads(
        intra_op=positive("TF_NUM_INTRAOP_THREADS"),
        inter_op=positive("TF_NUM_INTEROP_THREADS"),
    )
