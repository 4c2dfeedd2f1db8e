"""The errors that smp_tf raises on purpose.

Every message states the rule that was broken, the values as ``name=value``, the
place, and what to do about it. Each class also derives from the built-in that a
caller who knows nothing of smp_tf would catch.
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "MicrobatchError",
    "NotInitializedError",
    "PartitionError",
    "ScheduleError",
    "SmpError",
    "TraceError",
    "TransportError",
]


class SmpError(Exception):
    """Base of every error of this library."""

    # AutoGraph would turn what is raised inside a tf.function into its StagingError.
    ag_pass_through = True


class NotInitializedError(SmpError, RuntimeError):
    """A function of the library was called before ``smp.init()``."""


class ConfigError(SmpError, ValueError):
    """The configuration, or the way the job was launched, cannot work."""


class MicrobatchError(SmpError, ValueError):
    """An argument of a step cannot be split into the microbatches asked for."""


class TraceError(SmpError, ValueError):
    """A step function cannot be traced into a graph that smp_tf understands."""


class PartitionError(SmpError, ValueError):
    """No valid partition exists under the placements that were asked for."""


class ScheduleError(SmpError, ValueError):
    """A schedule breaks an order rule, or would wait forever."""


class TransportError(SmpError, RuntimeError):
    """A message between ranks failed: a dead peer, a deadline, a mismatch."""
