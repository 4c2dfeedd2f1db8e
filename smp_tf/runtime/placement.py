"""Where variables and layers are: the user's wishes before, the decision after."""

import contextlib
import contextvars
import dataclasses
import functools
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import tensorflow as tf

from smp_tf.config import Config
from smp_tf.errors import PartitionError
from smp_tf.plan.profile import Profile
from smp_tf.runtime import session

logger = logging.getLogger("smp_tf")

_Function = TypeVar("_Function", bound=Callable[..., Any])


@dataclasses.dataclass(frozen=True)
class Placement:
    """The partition of a model, decided by the first step that uses it.

    Attributes:
        session: the session it was decided in; it means nothing in another one.
        owner: id of a variable's handle -> partition.
        partition_of_layer: layer path -> partition.
        profile: the measured times it was decided with; None for estimates.
    """

    session: Any
    owner: Mapping[int, int]
    partition_of_layer: Mapping[str, int]
    profile: Profile | None = None

    def is_current(self) -> bool:
        return session.is_initialized() and session.current("step") is self.session

    def extended(
        self,
        owner: Mapping[int, int],
        partition_of_layer: Mapping[str, int],
        profile: Profile | None = None,
    ) -> "Placement":
        """With what a further step decided; what was decided before stays."""
        return Placement(
            self.session,
            {**owner, **self.owner},
            {**partition_of_layer, **self.partition_of_layer},
            self.profile or profile,
        )


def known(models: Sequence[Any]) -> Placement:
    """What earlier steps decided about any of ``models``."""
    merged = Placement(session.current("step"), {}, {})
    for model in models:
        if model.placement is not None:
            merged = merged.extended(
                model.placement.owner,
                model.placement.partition_of_layer,
                model.placement.profile,
            )
    return merged


def place(models: Sequence[Any], decided: Placement) -> None:
    """Tell the models where their variables are; then run what waited for that."""
    is_first = any(model.placement is None for model in models)
    for model in models:
        model.place(decided)
    if is_first:
        with tf.init_scope():
            run_post_partition_hooks()


_planned = contextvars.ContextVar[Config | None]("_planned", default=None)


@contextlib.contextmanager
def planning(config: Config) -> Iterator[None]:
    """What is traced inside is planned for this configuration, not for a session."""
    token = _planned.set(config)
    try:
        yield
    finally:
        _planned.reset(token)


@contextlib.contextmanager
def partition(index: int) -> Iterator[None]:
    """Place the operations created inside on partition ``index``; the innermost wins.

    Only with ``auto_partition: false``; otherwise it is ignored, with one warning.

    Raises:
        PartitionError: there is no such partition.
    """
    config = _planned.get() or session.config()
    if isinstance(index, bool) or not isinstance(index, int):
        raise PartitionError(f"smp.partition takes an int: index={index!r}")
    if not 0 <= index < config.partitions:
        raise PartitionError(
            f"smp.partition takes 0..{config.partitions - 1}: index={index};"
            f" partitions={config.partitions}"
        )
    if config.auto_partition:
        _warn_ignored()
        yield
        return
    from smp_tf.frontend.hooks import recording

    with recording.attributes(**{recording.PARTITION: index}):
        yield


@functools.cache
def _warn_ignored() -> None:
    warnings.warn(
        "smp.partition is ignored because auto_partition is true; set auto_partition"
        " to false and default_partition in the configuration to place operations by"
        " hand",
        stacklevel=4,
    )


# --- hooks that run after partitioning ------------------------------------------------

_waiting: list[tuple[Any, Callable[[], Any]]] = []  # (session, call)
_partitioned_session: Any = None


def register_post_partition_hook(function: _Function) -> _Function:
    """Decorator: calls made before partitioning wait for it, later calls run at once.

    A call that waits returns None; it runs eagerly, once, right after partitioning and
    before the first forward pass. For loading weights into local variables, say.
    """

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        current = session.current("register_post_partition_hook")
        if _partitioned_session is current:
            return function(*args, **kwargs)
        _waiting.append((current, functools.partial(function, *args, **kwargs)))
        return None

    return call  # type: ignore[return-value]


def run_post_partition_hooks() -> None:
    """A model has just been partitioned."""
    global _partitioned_session
    _partitioned_session = session.current("step")
    waiting, _waiting[:] = list(_waiting), []
    for waiting_session, function in waiting:
        if waiting_session is _partitioned_session:
            function()
