"""Write one rank's ``Program`` as a TensorFlow function.

The rules that measurements taught:

- The emitter draws every edge. Instructions run strictly in order, by control edges;
automatic
  control dependencies would chain the sends and receives of all microbatches.
- A send is queued and kept; nothing waits for it before the flush at the end. A send
that
  completes only when it is received queues behind the next segment in the executor and
  arrives up to a whole segment late: 28..30 % of the step lost, against 0.2 %.
- Gradients are added to a running sum right after their microbatch, and the next call
waits for
  the sum. Otherwise M gradients pile up.
- Every output of the function depends on all of its effects, so that none is pruned.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.frontend import hooks
from smp_tf.plan.graph import Graph
from smp_tf.plan.program import Instruction, Operation, Program
from smp_tf.plan.segment import SegmentPlan
from smp_tf.runtime.arguments import Feed, TensorArgument


@dataclasses.dataclass(frozen=True)
class Emitted:
    """One rank's step.

    Attributes:
        function: ConcreteFunction(*argument values) -> flat list of tensors.
        returned: position in the graph's returns -> positions of its M microbatches in
        the
            flat list; missing for gradients of other ranks' variables.
        summed: position in the graph's returns -> position of the running sum.
    """

    function: Any
    returned: Mapping[int, tuple[int, ...]]
    summed: Mapping[int, int]


@dataclasses.dataclass(frozen=True)
class EmitInputs:
    """All that ``emit`` writes from; everything is decided already.

    Attributes:
        functions: stage -> ConcreteFunction, for this rank's stages.
        sum_returns: positions in the graph's returns to add up (dense gradients).
        peers: pp_rank -> world rank.
    """

    graph: Graph
    plan: SegmentPlan
    program: Program
    functions: Mapping[int, Any]
    arguments: Sequence[TensorArgument]
    values: Sequence[tf.TensorSpec]
    sum_returns: frozenset[int]
    peers: Sequence[int]


def emit(inputs: EmitInputs) -> Emitted:
    """Build the function."""
    emitter: list[_Emitter] = []

    def body(*values: tf.Tensor) -> list[tf.Tensor]:
        emitter.append(_Emitter(inputs, values))
        return emitter[-1].run()

    with hooks.outside_of_graphs():
        graph = hooks.trace_function(
            f"smp_rank_{inputs.program.pp_rank}",
            body,
            inputs.values,
            control_dependencies=False,
        )
        graph.control_outputs = emitter[-1].last
        function = hooks.concrete(graph)
    return Emitted(function, emitter[-1].returned, emitter[-1].summed)


class _Emitter:
    """The working state of ``emit``: what has been written so far."""

    def __init__(self, inputs: EmitInputs, values: Sequence[tf.Tensor]) -> None:
        self.inputs = inputs
        self.count = inputs.program.num_microbatches
        self.made: list[dict[str, tf.Tensor]] = [{} for _ in range(self.count)]
        self.last: list[tf.Operation] = []
        self.sums: dict[int, tf.Tensor] = {}
        self.returned: dict[int, tuple[int, ...]] = {}
        self.summed: dict[int, int] = {}
        self._feed(values)

    def run(self) -> list[tf.Tensor]:
        write = {
            Operation.POST: self._post,
            Operation.WAIT: self._wait,
            Operation.CALL: self._call,
            Operation.SEND: self._send,
        }
        has_sent = False
        called: Instruction | None = (
            None  # the last call, while its gradients are not summed
        )
        for instruction in self.inputs.program.instructions:
            if called is not None and instruction.operation is not Operation.SEND:
                self._add_up(
                    called
                )  # after the sends: another rank may be waiting for them
                called = None
            with tf.control_dependencies(self.last):
                write[instruction.operation](instruction)
            if instruction.operation is Operation.CALL:
                called = instruction
            has_sent |= instruction.operation is Operation.SEND
        if called is not None:
            self._add_up(called)
        if has_sent:
            with tf.control_dependencies(self.last):
                self.last = [_ops().send_flush()]
        return self._outputs()

    # --- instructions

    def _call(self, instruction: Instruction) -> None:
        segment = self.inputs.plan.segments[instruction.stage]
        made = self.made[instruction.mb]
        fed = [made[name] for name in (*segment.inputs, *segment.arguments)]
        outputs = self.inputs.functions[instruction.stage](*fed)
        self.last = [outputs[0].op]
        made.update(zip(segment.outputs, outputs))

    def _add_up(self, instruction: Instruction) -> None:
        """Add the gradients that a segment returned to their running sums."""
        added = []
        for position, tensor in enumerate(self.inputs.graph.returns):
            stage = self.inputs.plan.return_stage[tensor].get(
                self.inputs.program.pp_rank
            )
            if position not in self.inputs.sum_returns or stage != instruction.stage:
                continue
            value = self.made[instruction.mb][tensor]
            if position in self.sums:
                with tf.control_dependencies(self.last):
                    self.sums[position] = self.sums[position] + value
                added.append(self.sums[position].op)
            else:
                self.sums[position] = value
        self.last = added or self.last

    def _send(self, instruction: Instruction) -> None:
        channel = _channel(instruction)
        self.last = [
            _ops().send_post(
                self.made[instruction.mb][channel.tensor],
                peer=self.inputs.peers[channel.peer],
                channel=channel.number,
                shape=_shape(channel.spec.shape),
                label=_label(instruction),
            )
        ]

    def _post(self, instruction: Instruction) -> None:
        self.last = [_ops().recv_post(**self._receive(instruction))]

    def _wait(self, instruction: Instruction) -> None:
        value = _ops().recv_wait(**self._receive(instruction))
        self.made[instruction.mb][_channel(instruction).tensor] = value
        self.last = [value.op]

    def _receive(self, instruction: Instruction) -> dict[str, Any]:
        channel = _channel(instruction)
        return {
            "dtype": tf.as_dtype(channel.spec.dtype),
            "shape": _shape(channel.spec.shape),
            "peer": self.inputs.peers[channel.peer],
            "channel": channel.number,
            "label": _label(instruction),
        }

    # --- arguments and results

    def _feed(self, values: Sequence[tf.Tensor]) -> None:
        """Cut the batch into microbatches (a split along axis 0 copies nothing)."""
        given = iter(values)
        for argument, name in zip(
            self.inputs.arguments, self.inputs.graph.arguments, strict=True
        ):
            for mb, piece in enumerate(self._pieces(argument, given)):
                self.made[mb][name] = piece

    def _pieces(self, argument: TensorArgument, given: Any) -> Sequence[tf.Tensor]:
        if argument.feed is Feed.SLICED:
            return [next(given) for _ in range(self.count)]
        value = next(given)
        if argument.feed is Feed.WHOLE or self.count == 1:
            return [value] * self.count
        if value.shape.rank is None or value.shape[argument.axis] is None:
            size = tf.shape(value)[argument.axis]
            check = tf.debugging.assert_equal(
                size % self.count,
                0,
                "MicrobatchError: a batch must divide into microbatches of equal size:"
                f" argument={argument.name!r} microbatches={self.count}",
            )
            with tf.control_dependencies([check]):
                value = tf.identity(value)
        pieces = tf.split(value, self.count, axis=argument.axis)
        for piece in pieces:
            piece.set_shape(argument.microbatch.shape)
        return pieces

    def _outputs(self) -> list[tf.Tensor]:
        flat: list[tf.Tensor] = []
        ranks = self.inputs.plan.return_stage
        with tf.control_dependencies(self.last):
            for position, tensor in enumerate(self.inputs.graph.returns):
                if self.inputs.program.pp_rank not in ranks[tensor]:
                    continue
                start = len(flat)
                flat += [tf.identity(made[tensor]) for made in self.made]
                self.returned[position] = tuple(range(start, len(flat)))
                if position in self.sums:
                    self.summed[position] = len(flat)
                    flat.append(tf.identity(self.sums[position]))
        return flat


def _ops() -> Any:
    """The send and receive operations; loaded when the first one is needed, so that
    a single process runs without the compiled library."""
    from smp_tf.transport import ops

    return ops


def _channel(instruction: Instruction) -> Any:
    assert instruction.channel is not None  # POST, WAIT and SEND always have one
    return instruction.channel


def _shape(shape: tuple[int | None, ...] | None) -> tf.TensorShape:
    return tf.TensorShape(shape)


def _label(instruction: Instruction) -> str:
    return (
        f"stage {instruction.stage} microbatch {instruction.mb}"
        f" {_channel(instruction).tensor}"
    )
