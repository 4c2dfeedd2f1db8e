"""The configuration of a job.

Settings come, key by key, from the first source that has them:

    1. the argument of smp.init()
    2. SMP_CONFIG               JSON text, or the path of a JSON file
    3. SM_HP_MP_PARAMETERS      JSON text, what a SageMaker job sets
    4. defaults

Each source is checked by itself, so an error names the source it is in; then the
whole is checked for combinations that cannot work. Only this module and `launch` read
environment variables.
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

__all__ = ["Config", "json_log", "resolve"]


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
    share_gpu: bool
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
    if config.shard_optimizer_state and not config.horovod:
        raise ConfigError(
            "`shard_optimizer_state`: divides optimizer state between replicas that "
            "train together; shard_optimizer_state=True, horovod=False; set horovod to "
            "true as well"
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
