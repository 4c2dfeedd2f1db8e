"""Sums over a group of ranks that never leave the GPUs, by NCCL.

NCCL wants the sums of a group in the same order from all of its ranks, and knows no
names; Horovod agrees on an order by messages. Here the sums begin in the order in which
the script asks for them: each writes one variable when it begins. It ends when it ends:
what does not read it goes on, on the host and on the device.
"""

from typing import Any

import tensorflow as tf

from smp_tf.frontend.hooks import graphs
from smp_tf.runtime import session
from smp_tf.runtime.collectives import in_turns, new_turn
from smp_tf.transport import ops
from smp_tf.transport.messages import CommGroup

DTYPES = frozenset(
    {"float16", "bfloat16", "float32", "float64", "int8", "uint8", "int64", "uint64"}
)
"""Types that NCCL adds up and that TensorFlow keeps in the memory of GPUs."""


def group_for(group: CommGroup, dtype: tf.DType) -> int | None:
    """What ``begin`` takes; None if the sum has to go another way.

    The first call connects, see ``GpuLinks.group_for_sums``; all ranks of the group
    decide alike.
    """
    if dtype.name not in DTYPES:
        return None
    return session.current("allreduce").gpu_links.group_for_sums(group)


def added_up(
    value: tf.Tensor, number: int, label: str
) -> tuple[tf.Tensor, tf.Operation]:
    """(the sum of a tensor, the operation that begins it), of a body of ``in_turns``.

    Args:
        number: of ``group_for``.
        label: what it is, for errors.
    """
    with tf.device("GPU:0"):
        begun = ops.sum_post(value, group=number, label=label)
        return ops.sum_wait(begun.sum, begun.handle), begun.sum.op


def total(value: tf.Tensor, group: CommGroup, number: int, label: str) -> tf.Tensor:
    """The sum of a tensor of known shape, as ``collectives.group_sum`` gives it.

    The first call with a type and shape asks the other ranks for theirs.

    Args:
        number: of ``group_for``.

    Raises:
        tf.errors.DataLossError: a rank has another type or shape.
        TransportError: a rank failed, or did not come within timeout_s.
    """
    known = _known.of(session.current("allreduce"))
    key = group, value.dtype, tuple(value.shape.as_list())
    if key not in known.functions:
        _compare(value, group, label)
        with graphs.outside_of_graphs():
            known.functions[key] = in_turns(
                "smp_gpu_sum",
                known.turn,
                lambda mine: _summed(mine, number, label),
                [tf.TensorSpec(value.shape, value.dtype)],
                device=None,
            )
    with graphs.without_tapes():
        return known.functions[key](value)[0]


def _compare(value: tf.Tensor, group: CommGroup, label: str) -> None:
    """NCCL would add up what is not alike, or wait for ever."""
    messages = session.current("allreduce").messages
    mine = f"{value.dtype.name} {value.shape.as_list()}"
    every = dict(zip(messages.members(group), messages.allgather(mine, group)))
    if len(set(every.values())) > 1:
        told = "; ".join(f"rank {rank}: {text}" for rank, text in every.items())
        raise tf.errors.DataLossError(
            None, None, f"smp_tf: the ranks add up other tensors: {label}: {told}"
        )


def _summed(
    mine: tf.Tensor, number: int, label: str
) -> tuple[list[tf.Tensor], list[tf.Operation]]:
    value, begun = added_up(mine, number, label)
    return [value], [begun]


def turn() -> tf.Variable:
    """The one that all sums of the session write; to be called outside of graphs."""
    return _known.of(session.current("allreduce")).turn


class _Known:
    """What the sums of the current session share."""

    def __init__(self) -> None:
        self._session: Any = None
        self.turn: Any = None
        self.functions: dict[Any, Any] = {}

    def of(self, current: Any) -> "_Known":
        if self._session is not current:
            with graphs.outside_of_graphs():
                self.turn = new_turn("smp_gpu_sum_turn")
            self._session, self.functions = current, {}
        return self


_known = _Known()
