"""What all ranks do alike: one that fails makes all of them fail."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import tensorflow as tf

from smp_tf.checkpoint.bundle import text_of
from smp_tf.errors import ConfigError, SmpError, TransportError
from smp_tf.runtime import session

_Result = TypeVar("_Result")

_REMEDY = (
    "the earlier checkpoints are as they were: free space, or allow reading and"
    " writing, and call it again"
)

_OF_DISKS = (
    tf.errors.OutOfRangeError,
    tf.errors.PermissionDeniedError,
    tf.errors.ResourceExhaustedError,
    tf.errors.UnknownError,
)
"""What TensorFlow raises for a disk that is full, or that it must not write to."""


def everywhere(call: str, function: Callable[[], _Result]) -> list[_Result]:
    """Run ``function``, which exchanges no messages, on every rank; what it returned,
    by rank. All ranks must call this.

    Raises:
        SmpError: on every rank, what one or more of them have raised, by rank.
        TransportError: a rank failed, or did not come within timeout_s.
    """
    result, error = attempt(function)
    found = session.allgather((call, result, portable(error)), session.WORLD)
    calls = [each for each, _, _ in found]
    if any(each != calls[0] for each in calls):
        listed = ", ".join(f"rank {rank}: {each}" for rank, each in enumerate(calls))
        raise SmpError(
            "all ranks must make the same calls of a CheckpointManager, in the same"
            f" order: {listed}"
        )
    raise_first([each for _, _, each in found], error)
    return [each for _, each, _ in found]


def require_same(call: str, found: Sequence[Mapping[str, Any]]) -> None:
    """Of what ``everywhere`` returned, on every rank.

    Raises:
        ConfigError: an argument is not the same on all ranks; names each.
    """
    different = [
        f"`{key}`: "
        + ", ".join(f"rank {rank}: {each[key]!r}" for rank, each in enumerate(found))
        for key in found[0]
        if any(each[key] != found[0][key] for each in found)
    ]
    if different:
        raise ConfigError(
            f"the arguments of {call} differ between ranks: {'; '.join(different)};"
            " give all ranks the same"
        )


def attempt(
    function: Callable[[], _Result],
) -> tuple[Any, Exception | None]:
    """(result, None) or (None, the error); not of messages, which all ranks have."""
    try:
        return function(), None
    except TransportError:
        raise
    except Exception as error:
        return None, error


def portable(error: Exception | None) -> tuple[bool, str] | None:
    """What other ranks need of an error: (is it of the configuration, its text)."""
    if error is None:
        return None
    if isinstance(error, SmpError):
        return isinstance(error, ConfigError), str(error)
    if isinstance(error, tf.errors.OpError):  # it names the file
        remedy = f"; {_REMEDY}" if isinstance(error, _OF_DISKS) else ""
        return False, f"{text_of(error)}{remedy}"
    if isinstance(error, OSError):
        return False, (
            f"{type(error).__name__}: {error.strerror}: file={error.filename!r};"
            f" {_REMEDY}"
        )
    return False, f"{type(error).__name__}: {error}"


def raise_first(
    found: list[tuple[bool, str] | None], cause: Exception | None = None
) -> None:
    """Raise what the first ranks found, if any of them found anything."""
    texts: dict[str, list[int]] = {}
    for rank, each in enumerate(found):
        if each is not None:
            texts.setdefault(each[1], []).append(rank)
    if not texts:
        return
    told = "; ".join(f"{_ranks(ranks)}: {text}" for text, ranks in texts.items())
    is_config = all(each is None or each[0] for each in found)
    raise (ConfigError if is_config else SmpError)(told) from cause


def _ranks(ranks: list[int]) -> str:
    if len(ranks) == session.size():
        return "all ranks"
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
