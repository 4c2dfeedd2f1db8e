"""What each rank keeps to itself: random states and iterators of datasets.

    ckpt-3.rank_0.json               states of the generators of Python, NumPy,
                                     TensorFlow and Keras; random counters of models
    ckpt-3.rank_0.iterators.index    iterators in the checkpoint, by TensorFlow
"""

import json
import pathlib
import random
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import tensorflow as tf

from smp_tf.checkpoint import manifest, parts
from smp_tf.checkpoint.bundle import text_of
from smp_tf.errors import ConfigError
from smp_tf.frontend.hooks.initial_values import RandomState
from smp_tf.runtime.random_counters import counters_of

Counters = dict[str, dict[str, dict[str, list[int]]]]
"""path of a model -> see ``smp_tf.runtime.random_counters``"""

_FILE = re.compile(r"(^|/)mp_rank_(?P<mp_rank>\d+)/[^/]*\.rank_(?P<rank>\d+)\.json$")


def prefix_of(prefix: pathlib.Path, rank: int) -> pathlib.Path:
    """Of the files of a rank, from that of its part."""
    return prefix.with_name(f"{prefix.name}.rank_{rank}")


def random_text(models: Mapping[str, Any]) -> str:
    """The states of the generators, and the counters of models, as JSON.

    Args:
        models: path in the checkpoint -> model.
    """
    counters = {path: counters_of(model).states() for path, model in models.items()}
    return json.dumps([*RandomState().content(), counters], default=_as_list)


def _as_list(value: Any) -> Any:
    return value.tolist()  # an array or a number of NumPy


def write(
    prefix: pathlib.Path, iterators: Mapping[str, Any], models: Mapping[str, Any]
) -> None:
    """Write the files of this rank.

    Args:
        prefix: see ``prefix_of``.
        iterators: path in the checkpoint -> iterator.
        models: path in the checkpoint -> model.

    Raises:
        OSError, tf.errors.OpError: they cannot be written, or an iterator has a state
            that cannot be saved.
    """
    write_random(prefix, random_text(models))
    if iterators:
        each = prefix.with_name(f"{prefix.name}.iterators")
        _checkpoint_of(iterators).write(str(each))
        for path in parts.files_of(each):
            parts.sync(path)


def write_random(prefix: pathlib.Path, text: str) -> None:
    manifest.write_text(prefix.with_name(f"{prefix.name}.json"), text)


def _checkpoint_of(iterators: Mapping[str, Any]) -> Any:
    ordered = [iterators[path] for path in sorted(iterators)]
    return tf.train.Checkpoint(
        **{f"iterator_{place}": each for place, each in enumerate(ordered)}
    )


def files_of(prefix: pathlib.Path) -> list[pathlib.Path]:
    """Those that ``write`` has written."""
    each = prefix.with_name(f"{prefix.name}.iterators")
    return [prefix.with_name(f"{prefix.name}.json"), *parts.files_of(each)]


def check_iterators(prefix: pathlib.Path, iterators: Mapping[str, Any]) -> None:
    """Raises:
    ConfigError: the checkpoint has not as many iterators.
    """
    file = prefix.with_name(f"{prefix.name}.iterators")
    if not iterators:
        return
    if not parts.files_of(file):
        raise ConfigError(
            "the checkpoint was saved without the states of iterators:"
            f" iterators={sorted(iterators)} file={str(file)!r}; leave them out of"
            " tf.train.Checkpoint to begin their datasets anew"
        )
    places = {
        name.partition("/")[0]
        for name, _ in tf.train.list_variables(str(file))
        if name.startswith("iterator_")
    }
    if len(places) != len(iterators):
        raise ConfigError(
            f"the checkpoint has the states of {len(places)} iterators:"
            f" iterators={sorted(iterators)} file={str(file)!r}; give"
            " tf.train.Checkpoint those that were saved, or none"
        )


def restore_iterators(prefix: pathlib.Path, iterators: Mapping[str, Any]) -> None:
    """Let the iterators go on where they were. After ``check_iterators``.

    Raises:
        ConfigError: they are of other datasets.
    """
    if not iterators:
        return
    file = prefix.with_name(f"{prefix.name}.iterators")
    try:
        _checkpoint_of(iterators).read(str(file)).assert_consumed()
    except (AssertionError, tf.errors.OpError) as error:
        raise ConfigError(
            "an iterator is of another dataset than that which was saved:"
            f" iterators={sorted(iterators)} file={str(file)!r}: {text_of(error)};"
            " leave it out of tf.train.Checkpoint to begin its dataset anew"
        ) from error


def of_replica(files: Iterable[str], dp_rank: int) -> list[tuple[int, int]]:
    """(mp_rank, rank) of each rank of one replica, from the files of a save.

    Args:
        dp_rank: of the replica; they count from the beginning where there were fewer.
    """
    ranks: dict[int, list[int]] = {}
    for match in filter(None, map(_FILE.search, files)):
        ranks.setdefault(int(match["mp_rank"]), []).append(int(match["rank"]))
    return [
        (mp_rank, sorted(each)[dp_rank % len(each)])
        for mp_rank, each in sorted(ranks.items())
    ]


def counters_in(prefixes: Iterable[pathlib.Path]) -> Counters | None:
    """The counters in the files of several ranks; None if they were saved before there
    were any.

    Raises:
        ConfigError: a file cannot be read.
    """
    every = [counters for _, counters in map(_content, prefixes)]
    found: Counters = {}
    for path, traces in (item for each in every if each for item in each.items()):
        for trace, counters in traces.items():
            found.setdefault(path, {}).setdefault(trace, {}).update(counters)
    return None if None in every else found


def take_over_counters(counters: Counters | None, models: Mapping[str, Any]) -> None:
    """The counters of models go on from these; from where they are without any.

    Args:
        models: path in the checkpoint -> model.
    """
    if counters is not None:
        for path, model in models.items():
            counters_of(model).take_over(counters.get(path, {}))


def _content(prefix: pathlib.Path) -> tuple[tuple[Any, ...], Counters | None]:
    """(states of the generators, counters)"""
    file = prefix.with_name(f"{prefix.name}.json")
    try:
        eager, keras, python, numpy, *more = json.loads(file.read_text())
        generators = (
            _as_tuple(eager),
            _as_tuple(keras),
            _as_tuple(python),
            (numpy[0], np.array(numpy[1], np.uint32), *numpy[2:]),
        )
        # A file of an earlier version of this library has no counters.
        counters = {
            path: {trace: dict(each) for trace, each in traces.items()}
            for path, traces in (more[0].items() if more else ())
        }
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise ConfigError(
            "the random states of a checkpoint cannot be read:"
            f" file={str(file)!r}: {error}; restore another checkpoint"
        ) from error
    return generators, counters if more else None


class RandomStates:
    """The states of a file, for the generators of this process.

    Raises:
        ConfigError: they cannot be read.
    """

    def __init__(self, prefix: pathlib.Path) -> None:
        self._content, _ = _content(prefix)

    def take_over(self) -> None:
        """All generators go on from these states."""
        RandomState().take_over(self._content)

    def take_over_graphs(self) -> None:
        """Those again that the trace of a step draws seeds from."""
        eager, keras, *_ = self._content
        content = (eager, keras, random.getstate(), np.random.get_state())
        RandomState().take_over(content)


def _as_tuple(value: Any) -> Any:
    return tuple(map(_as_tuple, value)) if isinstance(value, list) else value
