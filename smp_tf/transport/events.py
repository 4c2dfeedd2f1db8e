"""When the instructions of this process's steps ran.

The kernels record each run of a step: its calls, sends, receives and waits, and its own
begin and end. The events of the last complete run are always there; while ``keep`` is
on, those of every complete run wait until they are taken.

A single process without the compiled library records nothing.
"""

import ctypes
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from smp_tf.transport import ops

RUN_BEGIN, RUN_END = -1, -2
"""Numbers of the two events that are no instructions, the first and the last of a run;
each is an instant."""

_LAYOUT = np.dtype(  # struct Event in kernels/timeline.h
    [
        ("program", np.int32),
        ("event", np.int32),
        ("run", np.int64),
        ("start_ns", np.int64),
        ("end_ns", np.int64),
        ("bytes", np.int64),
    ]
)


class Event(NamedTuple):
    """One thing that happened.

    Attributes:
        program: number of the step's program in this process.
        event: index in ``Program.instructions``; the pieces of one call share it.
        run: counts the runs of all programs of this process, from 1.
        start_ns: as ``time.monotonic_ns()``. A call and a wait begin when their turn
            has come; a send when it is queued.
        end_ns: the call is done; what was awaited is there; what was sent has left.
        bytes: received or sent.
    """

    program: int
    event: int
    run: int
    start_ns: int
    end_ns: int
    bytes: int


def last() -> list[Event]:
    """The events of the last complete run, in the order of their ends.

    Raises:
        TransportError: here and below, the kernel library does not load.
    """
    count = _call("smp_events_last", None, 0)
    while True:  # a longer run may end meanwhile
        events = np.zeros(count, _LAYOUT)
        count = _call("smp_events_last", events.ctypes.data, events.size)
        if count <= events.size:
            return _listed(events[:count])


def take() -> list[Event]:
    """The kept events of whole runs, the oldest first; they are not kept any longer."""
    events = np.zeros(_call("smp_events_take", None, 0), _LAYOUT)
    count = _call("smp_events_take", events.ctypes.data, events.size)
    return _listed(events[:count])


def keep(max_events: int) -> None:
    """From now on, keep the events of complete runs, ``max_events`` at most: the oldest
    runs give way. Forgets what was kept before; 0 keeps none."""
    _call("smp_events_keep", max_events)


def dropped() -> int:
    """Kept events that gave way since ``keep``."""
    return _call("smp_events_dropped")


def _listed(events: npt.NDArray[np.void]) -> list[Event]:
    return [Event(*row) for row in events.tolist()]


_COUNT, _POINTER = ctypes.c_int64, ctypes.c_void_p
_SIGNATURES: dict[str, tuple[Any, ...]] = {  # name -> result, arguments
    "smp_events_last": (_COUNT, _POINTER, _COUNT),
    "smp_events_take": (_COUNT, _POINTER, _COUNT),
    "smp_events_keep": (_COUNT, _COUNT),
    "smp_events_dropped": (_COUNT,),
}


def _call(name: str, *arguments: Any) -> int:
    function = getattr(ops.load(), name)
    function.restype, *function.argtypes = _SIGNATURES[name]
    result: int = function(*arguments)
    return result
