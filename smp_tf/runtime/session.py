"""The session of this process: ``smp.init``, ranks, groups, messages.

Everything here is public as ``smp.<name>`` and, but for ``init`` and
``is_initialized``, raises ``NotInitializedError`` before ``smp.init()``.
"""

import atexit
import itertools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from smp_tf.config import Config
from smp_tf.errors import NotInitializedError, SmpError
from smp_tf.runtime import timeline
from smp_tf.runtime.join import Session, join
from smp_tf.transport.messages import CommGroup as CommGroup
from smp_tf.transport.messages import RankType as RankType

WORLD = CommGroup.WORLD
MP_GROUP = CommGroup.MP_GROUP
DP_GROUP = CommGroup.DP_GROUP
PP_GROUP = CommGroup.PP_GROUP
TP_GROUP = CommGroup.TP_GROUP
RDP_GROUP = CommGroup.RDP_GROUP

WORLD_RANK = RankType.WORLD_RANK
MP_RANK = RankType.MP_RANK
DP_RANK = RankType.DP_RANK
PP_RANK = RankType.PP_RANK
TP_RANK = RankType.TP_RANK
RDP_RANK = RankType.RDP_RANK

logger = logging.getLogger("smp_tf")

_session: Session | None = None
_epochs = itertools.count()  # of the calls of init; the same on all ranks


def init(config: Mapping[str, Any] | None = None) -> None:
    """Start the library: read the configuration and meet the other ranks.

    Call it once, before the model is built and before TensorFlow is first used. In one
    process without a launcher it opens nothing.

    A rank with GPUs takes one, number local_rank of those it sees or the only one, and
    TensorFlow sees no other; ``pinning`` has the rules.

    With ``horovod: true`` this rank's dp_group is Horovod's world from here to
    ``shutdown``: hvd.size() is dp_size(), hvd.rank() is dp_rank(), hvd.local_rank()
    counts within the dp_group. hvd.init() is not needed; after ``init`` it does
    nothing, before it it is an error.

    Args:
        config: keys of the configuration; without it SMP_CONFIG, then
            SM_HP_MP_PARAMETERS, then the defaults.

    Raises:
        ConfigError: a key, a value or a combination is not allowed, or the ranks do
            not have the same configuration; with ``horovod: true``, Horovod is missing
            or hvd.init() was called before; under MPI, mpi4py is missing; a rank has
            no GPU of its own, or TensorFlow was in use before with others.
        TransportError: a rank did not come within timeout_s, or failed on the way.
        SmpError: it was called before.
        TraceError: TensorFlow is loaded, and a private place of it that this library
            needs is not as it was; names it and the versions known to work.
    """
    global _session
    if _session is not None:
        raise SmpError(
            "smp.init() was called a second time in this process. Call it once, or "
            "smp.shutdown() in between."
        )
    # A process that only sends messages need not load TensorFlow for this; one that
    # loads it later has it tested by its first trace.
    if "tensorflow" in sys.modules:
        from smp_tf.frontend.hooks import self_test

        self_test.run()
    _session = join(config, next(_epochs))
    timeline.begin(_session)


def shutdown() -> None:
    """End the session; wait until all ranks do. ``init`` may follow.

    At the end of a script it happens by itself. Nothing happens without a session.

    Raises:
        SmpError: a checkpoint that was still being written is not whole. The session
            has ended nevertheless.
    """
    global _session
    errors = _call_last_ones()
    session, _session = _session, None
    timeline.end()
    if session is not None:
        session.leave()
    if errors:
        raise errors[0]


_EXIT_SECONDS = 30.0  # for ranks that end their scripts later, or in other ways

_last: list[Callable[[], None]] = []
_is_exit_failed = False


def call_last(function: Callable[[], None]) -> None:
    """Call ``function`` before the session ends, while all ranks are there.

    What it raises is raised by ``shutdown``. At the end of a script, that may be
    ``sys.exit`` of one rank, ranks wait for each other only for a while; an error is
    logged there, and makes the exit code 1.
    """
    _last.append(function)
    atexit.unregister(_call_at_exit)
    atexit.register(_call_at_exit)  # again, to come before the session is left


def call_no_more(function: Callable[[], None]) -> None:
    """Take back ``call_last``."""
    if function in _last:
        _last.remove(function)


def _call_last_ones() -> list[Exception]:
    """What they raise."""
    errors = []
    functions = _last[::-1] if _session is not None else []
    for function in functions:
        try:
            function()
        except Exception as error:
            errors.append(error)
    _last.clear()
    return errors


def _call_at_exit() -> None:
    global _is_exit_failed
    if _session is None:
        return
    with _session.messages.within(_EXIT_SECONDS):
        for error in _call_last_ones():
            _is_exit_failed = True
            logger.error("at the end of the script: %s", error)


def _fail_exit() -> None:
    """The last function of ``atexit``, as it was registered first. Python itself has no
    way to change the exit code there."""
    if _is_exit_failed:
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(1)


atexit.register(_fail_exit)


def is_initialized() -> bool:
    """Whether ``smp.init()`` was called in this process."""
    return _session is not None


def current(function: str) -> Session:
    """The session, for the public function of this name.

    Raises:
        NotInitializedError: names ``function``.
    """
    if _session is None:
        raise NotInitializedError(
            f"smp.{function} needs a session. Call smp.init() before it, once."
        )
    return _session


def config() -> Config:
    """The resolved configuration."""
    return current("config").config


# Ranks and sizes.


def rank() -> int:
    """Number of this process in the job."""
    return current("rank").rank


def size() -> int:
    """Number of processes in the job."""
    return current("size").topology.size


def local_rank() -> int:
    """Number of this process on its host."""
    return current("local_rank").launch.local_rank


def local_size() -> int:
    """Number of the job's processes on this host."""
    return current("local_size").launch.local_size


def mp_rank() -> int:
    """Place of this rank in its mp_group."""
    session = current("mp_rank")
    return session.topology.mp_rank(session.rank)


def mp_size() -> int:
    """Ranks that hold one replica of the model."""
    return current("mp_size").topology.mp_size


def dp_rank() -> int:
    """Place of this rank in its dp_group."""
    session = current("dp_rank")
    return session.topology.dp_rank(session.rank)


def dp_size() -> int:
    """Ranks that hold the same partition."""
    return current("dp_size").topology.dp_size


def pp_rank() -> int:
    """The partition that this rank holds."""
    session = current("pp_rank")
    return session.topology.pp_rank(session.rank)


def pp_size() -> int:
    """Number of partitions."""
    return current("pp_size").topology.pp_size


def tp_rank() -> int:
    """Place of this rank in its tp_group."""
    session = current("tp_rank")
    return session.topology.tp_rank(session.rank)


def tp_size() -> int:
    """Ranks that share one tensor-parallel layer."""
    return current("tp_size").topology.tp_size


def rdp_rank() -> int:
    """The replica that this rank belongs to."""
    session = current("rdp_rank")
    return session.topology.rdp_rank(session.rank)


def rdp_size() -> int:
    """Number of replicas of the model."""
    return current("rdp_size").topology.rdp_size


# Groups, as world ranks.


def get_world_group() -> list[int]:
    """All ranks."""
    return _group("get_world_group", CommGroup.WORLD)


def get_mp_group() -> list[int]:
    """Ranks that hold the same replica of the model as this one."""
    return _group("get_mp_group", CommGroup.MP_GROUP)


def get_dp_group() -> list[int]:
    """Ranks that hold the same partition as this one."""
    return _group("get_dp_group", CommGroup.DP_GROUP)


def get_pp_group() -> list[int]:
    """Ranks of the same pipeline as this one."""
    return _group("get_pp_group", CommGroup.PP_GROUP)


def get_tp_group() -> list[int]:
    """Ranks that share their tensor-parallel layers with this one."""
    return _group("get_tp_group", CommGroup.TP_GROUP)


def get_rdp_group() -> list[int]:
    """Ranks with the same weights as this one."""
    return _group("get_rdp_group", CommGroup.RDP_GROUP)


def _group(function: str, group: CommGroup) -> list[int]:
    return list(current(function).messages.members(group))


# Messages. ``obj`` is anything that can be pickled.


def send(obj: Any, dest_rank: int, rank_type: RankType) -> None:
    """Send ``obj`` to one rank; return when it has made the matching receive.

    Raises:
        ValueError: no such rank or rank type, or the caller itself.
        TransportError: that rank failed, or did not receive within timeout_s.
    """
    current("send").messages.send(obj, dest_rank, rank_type)


def recv_from(src_rank: int, rank_type: RankType) -> Any:
    """The next object that ``src_rank`` sends to this rank, or broadcasts.

    Raises:
        ValueError: no such rank or rank type, or the caller itself.
        TransportError: that rank failed, or did not send within timeout_s.
    """
    return current("recv_from").messages.recv_from(src_rank, rank_type)


def broadcast(obj: Any, group: CommGroup) -> None:
    """Send ``obj`` to the other ranks of ``group``, which call ``recv_from``.

    Raises:
        ValueError: no such group.
        TransportError: a rank failed, or did not receive within timeout_s.
    """
    current("broadcast").messages.broadcast(obj, group)


def allgather(obj: Any, group: CommGroup) -> list[Any]:
    """The objects of all ranks of ``group``, in the order of the group.

    Raises:
        ValueError: no such group.
        TransportError: a rank failed, or did not call it within timeout_s.
    """
    return current("allgather").messages.allgather(obj, group)


def barrier(group: CommGroup = WORLD) -> None:
    """Return when all ranks of ``group`` have called it; raises as ``allgather``."""
    current("barrier").messages.barrier(group)


def mp_barrier() -> None:
    """``barrier`` of this rank's mp_group."""
    current("mp_barrier").messages.barrier(CommGroup.MP_GROUP)


def dp_barrier() -> None:
    """``barrier`` of this rank's dp_group."""
    current("dp_barrier").messages.barrier(CommGroup.DP_GROUP)


def pp_barrier() -> None:
    """``barrier`` of this rank's pp_group."""
    current("pp_barrier").messages.barrier(CommGroup.PP_GROUP)
