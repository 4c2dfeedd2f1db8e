"""``horovod: true``: this rank's dp_group becomes Horovod's world.

    world rank  0  1  2  3     2 partitions x 2 replicas, cluster
    dp_group    0  1  0  1
    hvd.rank()  0  0  1  1     two worlds: {0, 2} and {1, 3}

Under Gloo a world is a set of environment variables and a key-value store
(`gloo_world`). They stay while it lives, because Horovod comes back to them for process
sets. Where MPI has started the job and Horovod was built with it, a world is one of
MPI's communicators.

No rank stays in Horovod when another one has failed. Gloo notices when a connection
breaks, and that names nobody; nothing breaks between ranks that all wait. So a thread
looks for the transport's news of failed ranks, and then shuts Horovod down: what waits
in it raises, and ``Guard`` says which rank failed.
"""

import atexit
import contextlib
import importlib
import os
import threading
from collections.abc import Sequence
from typing import Any

from smp_tf.errors import ConfigError, TransportError
from smp_tf.launch import Launch, controller, environment
from smp_tf.runtime import gloo_world
from smp_tf.transport import mpi
from smp_tf.transport.engine import Engine
from smp_tf.transport.messages import CommGroup, Messages

_NEWS_SECONDS = 0.2  # between two looks for a failed rank
_MODULE = "horovod.tensorflow"


def require() -> Any:
    """The module horovod.tensorflow, not yet initialised.

    Raises:
        ConfigError: it is missing, does not fit TensorFlow, or the script has
            initialised it.
    """
    try:
        hvd = importlib.import_module(_MODULE)
    except Exception as error:  # ImportError, and what a wheel of another build raises
        raise ConfigError(
            f"`horovod`: needs Horovod with TensorFlow support; horovod=True, import "
            f"{_MODULE}: {type(error).__name__}: {error}. Install Horovod 0.28.1 built "
            f"for this TensorFlow, as .ci/horovod_wheel does, or leave horovod out."
        ) from error
    if hvd.is_initialized():
        raise ConfigError(
            "`horovod`: hvd.init() was called before smp.init(); horovod=True, "
            f"hvd.size()={hvd.size()}. Leave hvd.init() out: smp.init() makes this "
            "rank's dp_group Horovod's world."
        )
    return hvd


class HorovodWorld:
    """Horovod's world of one session: from ``begin`` to ``close``."""

    def __init__(
        self, engine: Engine | None, messages: Messages, timeout_s: float
    ) -> None:
        self._hvd = require()
        self._engine = engine
        self._messages = messages
        self._timeout_s = timeout_s
        self._held = contextlib.ExitStack()  # the store, the environment variables
        self._closing = threading.Event()

    def begin(self, launch: Launch, hosts: Sequence[str]) -> None:
        """Initialise Horovod; all ranks of the dp_group call it.

        Args:
            hosts: of every rank of the job.

        Raises:
            ConfigError: no network interface reaches the other hosts.
            TransportError: a rank of the dp_group failed on the way.
        """
        members = self._messages.members(CommGroup.DP_GROUP)
        place = members.index(launch.rank)
        _serialize_shutdown(self._hvd)
        try:
            if launch.mpi and self._with_mpi(launch):
                self._begin_with_mpi(launch, members)
            else:
                self._begin_with_gloo([hosts[member] for member in members], place)
            self._check(members, place)
            # A store must live until the last rank has said goodbye to it.
            self._messages.barrier(CommGroup.DP_GROUP)
        except BaseException:
            self.close()
            raise
        _living.append(self)
        # Registered after Guard's, and so called before: while the peers are there.
        atexit.register(self.close)
        if self._engine is not None:
            threading.Thread(
                target=self._watch, args=(self._engine,), name="smp_tf", daemon=True
            ).start()

    def close(self) -> None:
        """Shut Horovod down, on this rank and with it on the others of its world."""
        self._closing.set()
        atexit.unregister(self.close)
        self._hvd.shutdown()
        self._held.close()
        if self in _living:
            _living.remove(self)

    def explain(self, error: BaseException) -> str | None:
        """What to tell of an error of Horovod, which names no rank of the job."""
        kind = type(error)
        theirs = kind.__module__.startswith("tensorflow.") and "orovod" in str(error)
        if not theirs and kind.__name__ != "HorovodInternalError":
            return None
        members = ", ".join(map(str, self._messages.members(CommGroup.DP_GROUP)))
        return (
            f"it waited in Horovod, whose ranks 0, 1, .. are the ranks {members} of "
            "the job; Horovod's rank 0 reports which of them did not come"
        )

    def _with_mpi(self, launch: Launch) -> bool:
        """Whether Horovod can and may use MPI, on every rank of the dp_group."""
        library = mpi.library(launch.rank, launch.size)
        # Horovod calls MPI from a thread of its own.
        threads = library.Query_thread() == library.THREAD_MULTIPLE
        able = threads and self._hvd.mpi_built() and controller() != "gloo"
        return all(self._messages.allgather(bool(able), CommGroup.DP_GROUP))

    def _begin_with_mpi(self, launch: Launch, members: Sequence[int]) -> None:
        world = mpi.library(launch.rank, launch.size).COMM_WORLD
        # Never freed: that would be one more call in which all ranks wait.
        communicator = world.Create_group(world.Get_group().Incl(list(members)))
        chosen = {"HOROVOD_CONTROLLER": "mpi", "HOROVOD_CPU_OPERATIONS": "mpi"}
        self._initialise(dict(chosen), communicator)

    def _begin_with_gloo(self, hosts: Sequence[str], place: int) -> None:
        interface, address = gloo_world.interface_of(hosts, place)
        store = None
        if len(hosts) > 1:
            if place == 0:
                store = self._held.enter_context(gloo_world.store(address))
            store = self._messages.allgather(store, CommGroup.DP_GROUP)[0]
        self._initialise(gloo_world.variables(hosts, place, interface, store), None)

    def _initialise(self, variables: dict[str, str | None], comm: Any) -> None:
        limits = gloo_world.deadlines(self._timeout_s)
        self._held.enter_context(environment({**variables, **limits}))
        self._hvd.init(comm)
        atexit.unregister(self._hvd.shutdown)  # it is for `close` to call

    def _check(self, members: Sequence[int], place: int) -> None:
        rank, size = self._hvd.rank(), self._hvd.size()
        if (rank, size) != (place, len(members)):
            raise TransportError(
                f"Horovod made another world than the dp_group; "
                f"dp_group={list(members)}, dp_rank={place}, dp_size={len(members)}, "
                f"hvd.rank()={rank}, hvd.size()={size}"
            )

    def _watch(self, engine: Engine) -> None:
        """Thread: when a rank has failed, end what waits in Horovod on this one."""
        while not self._closing.wait(_NEWS_SECONDS):
            if engine.failure() is not None:
                self._hvd.shutdown()
                return

    def _forget(self) -> None:
        """In a forked child, where the thread that a shutdown waits for is missing."""
        atexit.unregister(self.close)
        atexit.unregister(self._hvd.shutdown)


class _Serialized:
    """A function of C that two threads must not be in at the same time."""

    def __init__(self, function: Any) -> None:
        self._function = function
        self._lock = threading.Lock()

    def __call__(self) -> None:
        with self._lock:
            self._function()


def _serialize_shutdown(hvd: Any) -> None:
    """Let several threads shut Horovod down, ours and an exiting script's.

    horovod_shutdown joins a thread; of two callers at once both would join it.
    """
    library = hvd.shutdown.__self__.MPI_LIB_CTYPES
    if not isinstance(library.horovod_shutdown, _Serialized):
        library.horovod_shutdown = _Serialized(library.horovod_shutdown)


_living: list[HorovodWorld] = []


def _forget_in_child() -> None:
    for world in _living:
        world._forget()


os.register_at_fork(after_in_child=_forget_in_child)
