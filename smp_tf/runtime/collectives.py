"""Sums over the ranks of a group, as operations of a graph.

For what a train step needs of the whole model after the pipeline: the norm of all
gradients, whether any of them is not finite. Every rank sends its values to every
other rank and adds up what it has, in the order of the ranks:

    rank 0   send a to 1, 2   wait for b, c   (a + b) + c
    rank 1   send b to 0, 2   wait for a, c   (a + b) + c
    rank 2   send c to 0, 1   wait for a, b   (a + b) + c

So all ranks get the same bits, after one hop. Long values would travel once for each
pair of ranks; where that is more than need be, each rank adds up one piece of them in
the same way and sends it to the others, which is one more hop.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.errors import SmpError
from smp_tf.frontend.hooks import graphs, initial_values, recording
from smp_tf.runtime import session
from smp_tf.runtime.channels import OF_SUMS
from smp_tf.runtime.session import CommGroup

LONG_BYTES = 1 << 16
"""From here on values are summed in pieces, between three ranks or more."""


def pipeline_sum(values: tf.Tensor, label: str) -> tf.Tensor:
    """``group_sum`` over the ranks of the pp_group."""
    return group_sum(values, session.PP_GROUP, label)


@graphs.unconverted
def group_sum(values: tf.Tensor, group: CommGroup, label: str) -> tf.Tensor:
    """The sum of ``values`` over the ranks of a group; themselves in a group of one.

    Every rank of the group calls it in the same order among its calls, eagerly or while
    a ``tf.function`` is traced, also in a loop. Calls run in that order, each of them
    even if nobody uses the sum.

    Args:
        values: a tensor of the same type and shape on all ranks.
        label: what errors call it: the label of the first sum of this type and shape.

    Returns:
        A tensor like ``values``, with the same bits on all ranks.

    Raises:
        SmpError: it is called while a step is traced.
        tf.errors.UnavailableError: when it runs: a rank died or left; named.
        tf.errors.DeadlineExceededError: when it runs: a rank did not come within
            timeout_s.
        tf.errors.DataLossError: when it runs: the ranks have other types or shapes.
    """
    refuse_in_step("group_sum")
    if len(members(group)) == 1:
        return values
    spec = tf.TensorSpec(values.shape, values.dtype)
    with graphs.without_tapes():
        return _sums.function_for(group, spec, label)(values)[0]


def members(group: CommGroup) -> Sequence[int]:
    """World ranks of this rank's group, in the order of the group."""
    return session.current("group_sum").messages.members(group)


def refuse_in_step(name: str) -> None:
    """Raise SmpError while a step is traced.

    A step is traced for one microbatch of the whole model, and its operations are
    divided among the ranks afterwards; what is summed over ranks is not there yet.
    """
    if recording.is_tracing():
        raise SmpError(
            "inside a function decorated with smp.step gradients are those of one"
            f" microbatch, and not yet divided among the ranks: function={name};"
            " return the gradients from the step, accumulate() them and call it then"
        )


def new_turn(name: str) -> tf.Variable:
    """A variable that the calls of a function write when they begin.

    So calls in one graph, and in the turns of a loop, run one by one: two at once would
    take each other's messages.
    """
    with tf.device("CPU:0"):
        # Not tf.Variable: no variable creator of the script has a say.
        return initial_values.ResourceVariable(
            0, dtype=tf.int64, trainable=False, name=name
        )


def in_turns(
    name: str,
    turn: tf.Variable,
    body: Callable[..., tuple[list[tf.Tensor], list[tf.Operation]]],
    specs: Sequence[tf.TensorSpec],
    device: str | None = "CPU:0",
) -> Any:
    """A ConcreteFunction whose calls run one by one, each of them to its end.

    Must be called outside of graphs.

    Args:
        body: returns (outputs, operations that are over when all is done). What it
            writes waits for this call's turn.
        device: where the body runs; None: where TensorFlow places it.
    """
    done: list[tf.Operation] = []

    def run(*inputs: tf.Tensor) -> list[tf.Tensor]:
        with tf.device("CPU:0"):
            begin = turn.assign_add(1, read_value=False)
        with tf.device(device), tf.control_dependencies([begin]):
            outputs, ended = body(*inputs)
        done.extend([begin, *ended])
        return outputs

    graph = graphs.trace_function(name, run, specs, control_dependencies=False)
    graph.control_outputs = done
    return graphs.concrete(graph)


def ordered_sum(values: Sequence[tf.Tensor]) -> tf.Tensor:
    """The sum of tensors of one shape, added up in their order."""
    if len(values) == 2:
        return values[0] + values[1]
    # A chain of additions would be rewritten to AddN, which begins with whichever input
    # it may overwrite: another one on each rank, and other last bits.
    return tf.cumsum(tf.stack(values))[-1]


class _Sums:
    """The functions of the current session: one for each group, type and shape.

    They take turns, and so one channel is enough for a group: ranks need not trace the
    function around a sum equally often, nor build the sums in the same order.
    """

    def __init__(self) -> None:
        self._session: Any = None
        self._functions: dict[Any, Any] = {}
        self._turn: Any = None

    def function_for(self, group: CommGroup, spec: tf.TensorSpec, label: str) -> Any:
        """The ConcreteFunction that sums values of this type and shape."""
        current = session.current("group_sum")
        if self._session is not current:
            self._session, self._functions = current, {}
        shape = None if spec.shape.rank is None else tuple(spec.shape.as_list())
        key = (group, spec.dtype, shape)
        if key not in self._functions:
            with graphs.outside_of_graphs():
                if self._turn is None:
                    self._turn = new_turn("smp_sum_turn")
                self._functions[key] = in_turns(
                    "smp_sum",
                    self._turn,
                    lambda mine: _summed(mine, group, label),
                    [spec],
                )
        return self._functions[key]


_sums = _Sums()


def _summed(
    mine: tf.Tensor, group: CommGroup, label: str
) -> tuple[list[tf.Tensor], list[tf.Operation]]:
    """([the sum], operations that are over when all is done)."""
    ranks, length = members(group), mine.shape.num_elements()
    link = Link(OF_SUMS + group.value, label)
    if len(ranks) == 2 or length is None or length * mine.dtype.size < LONG_BYTES:
        same = dict.fromkeys(ranks, mine)
        total = ordered_sum(_exchange(link, same, dict.fromkeys(ranks, mine.shape)))
    else:
        total = tf.reshape(_by_pieces(link, tf.reshape(mine, [-1]), ranks), mine.shape)
    with tf.control_dependencies([total]):
        flushed = link.flush()
    with tf.control_dependencies([flushed]):
        total = tf.identity(total)
    return [total], [total.op]


def _by_pieces(link: "Link", mine: tf.Tensor, ranks: Sequence[int]) -> tf.Tensor:
    """The sum of a vector, of which each rank adds up one piece."""
    count, length = len(ranks), mine.shape[0]
    sizes = [(i + 1) * length // count - i * length // count for i in range(count)]
    pieces = dict(zip(ranks, tf.split(mine, sizes), strict=True))
    shapes = {rank: piece.shape for rank, piece in pieces.items()}
    own = dict.fromkeys(ranks, shapes[session.rank()])
    total = ordered_sum(_exchange(link, pieces, own))
    with tf.control_dependencies([total]):
        return tf.concat(_exchange(link, dict.fromkeys(ranks, total), shapes), 0)


def _exchange(
    link: "Link", outgoing: dict[int, tf.Tensor], shapes: dict[int, tf.TensorShape]
) -> list[tf.Tensor]:
    """What each rank has for this one, in the order of ``outgoing``.

    Args:
        outgoing: rank -> what it gets.
        shapes: rank -> shape of what comes from it.
    """
    mine = outgoing[session.rank()]
    others = [rank for rank in outgoing if rank != session.rank()]
    # All at once: nothing here waits for a receiver.
    sent = [link.send(outgoing[peer], peer) for peer in others]
    with tf.control_dependencies(sent):
        found = {peer: link.receive(mine.dtype, shapes[peer], peer) for peer in others}
    return [found.get(rank, mine) for rank in outgoing]


class Link:
    """One channel between this rank and others, for operations of a graph."""

    def __init__(self, channel: int, label: str) -> None:
        """
        Args:
            label: what errors call that which travels.
        """
        self._about: dict[str, Any] = {"channel": channel, "label": label}

    def send(self, value: tf.Tensor, peer: int) -> tf.Operation:
        """Queue ``value`` for a rank; nothing waits until it is received."""
        from smp_tf.transport import ops

        return ops.send_post(value, peer=peer, shape=value.shape, **self._about)

    def receive(self, dtype: tf.DType, shape: Any, peer: int) -> tf.Tensor:
        """The next value from a rank; both ends know the same of its shape."""
        from smp_tf.transport import ops

        shape = tf.TensorShape(shape)
        return ops.recv_wait(dtype, shape, peer=peer, **self._about)

    def flush(self) -> tf.Operation:
        """Wait until all that this process has queued has left."""
        from smp_tf.transport import ops

        return ops.send_flush()
