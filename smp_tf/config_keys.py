"""The table of configuration keys: what each may hold, and what it is if not set.

Plain data for `config`, which adds the sources and the checks across keys.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from smp_tf.topology import PLACEMENTS

__all__ = ["ALIASES", "DEFAULTS", "LATER", "RULES", "Rule"]

ALIASES = {"pipeline_parallel_degree": "partitions", "ddp": "horovod"}

DEFAULTS: dict[str, Any] = {
    # Without partitions, active_microbatches and memory_weight: they depend on other
    # values.
    "microbatches": 1,
    "pipeline": "interleaved",
    "virtual_stages": 1,
    "schedule_file": None,
    "optimize": "memory",
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

# Keys that are understood and checked, but of which only this value works so far.
LATER: dict[str, tuple[object, str]] = {
    "tensor_parallel_degree": (1, "tensor parallelism"),
    "offload_activations": (False, "offloading of activations"),
    "activation_loading_horizon": (4, "offloading of activations"),
    "check_inputs": (False, "comparison of the inputs of all ranks"),
}


@dataclass(frozen=True)
class Rule:
    """What one key may hold.

    Attributes:
        allowed: for people.
        accept: returns the value in its final type, or raises ValueError.
        words: values that a mistyped word may have meant.
    """

    allowed: str
    accept: Callable[[object], Any]
    words: tuple[str, ...] = ()


def _integer(minimum: int) -> Rule:
    def accept(value: object) -> int:
        # bool is an int for Python, but True microbatches are a mistake.
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError
        return int(value)

    return Rule(f"an integer, at least {minimum}", accept)


def _integer_or_none(minimum: int) -> Rule:
    integer = _integer(minimum)

    def accept(value: object) -> int | None:
        return None if value is None else int(integer.accept(value))

    return Rule(f"{integer.allowed}, or null", accept)


def _number(allowed: str, in_range: Callable[[float], bool]) -> Rule:
    def accept(value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError
        # NaN, which JSON text can hold too, is in no range.
        if not in_range(value):
            raise ValueError
        return float(value)

    return Rule(allowed, accept)


def _boolean() -> Rule:
    def accept(value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Rule("true or false", accept)


def _word(*words: str) -> Rule:
    def accept(value: object) -> str:
        if not isinstance(value, str) or value not in words:
            raise ValueError
        return value

    return Rule("one of " + ", ".join(f'"{word}"' for word in words), accept, words)


def _path_or_none() -> Rule:
    def accept(value: object) -> str | None:
        if value is None:
            return None
        if not isinstance(value, (str, os.PathLike)) or not os.fspath(value):
            raise ValueError
        return os.fsdecode(value)

    return Rule("a path, or null", accept)


RULES: dict[str, Rule] = {
    "partitions": _integer(1),
    "microbatches": _integer(1),
    "pipeline": _word("interleaved", "simple", "zero_bubble", "auto"),
    "virtual_stages": _integer(1),
    "schedule_file": _path_or_none(),
    "active_microbatches": _integer(1),
    "optimize": _word("memory", "speed"),
    "memory_weight": _number("a number from 0.0 to 1.0", lambda x: 0 <= x <= 1),
    "memory_limit_bytes": _integer_or_none(1),
    "partition_file": _path_or_none(),
    "profile": _boolean(),
    "auto_partition": _boolean(),
    "default_partition": _integer(0),
    "contiguous": _boolean(),
    "placement_strategy": _word(*PLACEMENTS),
    "horovod": _boolean(),
    "xla": _boolean(),
    "tensor_parallel_degree": _integer(1),
    "shard_optimizer_state": _boolean(),
    "offload_activations": _boolean(),
    "activation_loading_horizon": _integer(1),
    "check_inputs": _boolean(),
    "share_gpu": _boolean(),
    "trace_dir": _path_or_none(),
    "timeout_s": _number(
        "a finite number of seconds above 0", lambda x: 0 < x < math.inf
    ),
}
