"""Write one rank's ``Program`` as a TensorFlow function.

The rules that measurements taught:

- The emitter draws every edge. Instructions run strictly in order, by control edges;
  automatic control dependencies would chain the sends and receives of all microbatches.
- What another rank waits for leaves before the rest of its segment runs: the weights'
  gradients of a backward, a fifth of it, that 1F1B would wait for at its end.
- A send is queued and kept; nothing waits for it before the flush at the end. A send
  that completes only when it is received queues behind the next segment in the executor
  and arrives up to a whole segment late: 28..30 % of the step lost, against 0.2 %.
- Segments are called by an operation of our own: TensorFlow's takes as long for each
  call in a graph as for a new function. A step of 7760 operations needed 90 s of CPU
  before its first microbatch at M = 64, against 8 s at M = 4.
- Gradients are added to a running sum right after their microbatch, and the next call
  waits for the sum. Otherwise M gradients pile up.
- Many gradients are added in one call of a function: a node for each of them and each
  microbatch made writing and optimising the graph of BERT-large at M = 64 take 12 s of
  22, against 2 of 7 for all else. A call holds its old and its new sums, hence a limit.
- Steps take turns. TensorFlow orders two calls in one function only where one of them
  writes a variable that the other uses: two that only read (the gradients of two
  batches, an evaluation) would run at once and take each other's messages. So every
  step writes one variable of the process.
- Every output of the function depends on all of its effects, so that none is pruned;
  but for gradients. Their sums leave as soon as the last microbatch is added, so that
  data parallelism averages them while the tail of the pipeline still runs: TensorFlow
  takes the function apart where a ``tf.function`` calls it. Whatever writes a variable
  after the step still waits for all of it, as TensorFlow orders it.
"""

import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.errors import TransportError
from smp_tf.frontend.hooks import graphs, initial_values
from smp_tf.plan.graph import Graph
from smp_tf.plan.program import (
    Channel,
    Instruction,
    Operation,
    Program,
    go_together,
)
from smp_tf.plan.segment import Segment, SegmentPlan
from smp_tf.runtime.arguments import Feed, TensorArgument
from smp_tf.runtime.implementations import unwanted_optimizers
from smp_tf.runtime.lower import noinline

FEW_ADDS = 4
"""So many additions, or fewer, run faster by themselves than in a call."""


@dataclasses.dataclass(frozen=True)
class Emitted:
    """One rank's step.

    Attributes:
        function: ConcreteFunction(*argument values) -> flat list of tensors.
        returned: position in the graph's returns -> positions of its M microbatches in
            the flat list; missing for gradients of other ranks' variables.
        summed: position in the graph's returns -> position of the running sum.
        program: what the function does.
    """

    function: Any
    returned: Mapping[int, tuple[int, ...]]
    summed: Mapping[int, int]
    program: Program


@dataclasses.dataclass(frozen=True)
class EmitInputs:
    """All that ``emit`` writes from; everything is decided already.

    Attributes:
        functions: stage -> its pieces in order, each with its ConcreteFunction; for
            this rank's stages.
        sum_groups: stage -> for each piece, groups of positions in the graph's returns
            to add up at a time (dense gradients).
        peers: pp_rank -> world rank.
        number: what the timeline calls the program in this process.
        device_of: (dtype, world rank of the other end) -> where an operation stands
            that sends or receives; "" for wherever TensorFlow puts it.
    """

    graph: Graph
    plan: SegmentPlan
    program: Program
    functions: Mapping[int, Sequence[tuple[Segment, Any]]]
    arguments: Sequence[TensorArgument]
    values: Sequence[tf.TensorSpec]
    sum_groups: Mapping[int, Sequence[Sequence[tuple[int, ...]]]]
    peers: Sequence[int]
    number: int = 0
    device_of: Callable[[str, int], str] = lambda dtype, peer: ""


def emit(inputs: EmitInputs) -> Emitted:
    """Build the function."""
    emitter: list[_Emitter] = []

    def body(*values: tf.Tensor) -> list[tf.Tensor]:
        emitter.append(_Emitter(inputs, values))
        return emitter[-1].run()

    with graphs.outside_of_graphs():
        graph = graphs.trace_function(
            f"smp_rank_{inputs.program.pp_rank}",
            body,
            inputs.values,
            control_dependencies=False,
        )
        graph.control_outputs = emitter[-1].last
        function = graphs.concrete(graph)
    last = emitter[-1]
    return Emitted(function, last.returned, last.summed, inputs.program)


class _Emitter:
    """The working state of ``emit``: what has been written so far."""

    def __init__(self, inputs: EmitInputs, values: Sequence[tf.Tensor]) -> None:
        self.inputs = inputs
        self.count = inputs.program.num_microbatches
        self.made: list[dict[str, tf.Tensor]] = [{} for _ in range(self.count)]
        self.last: list[tf.Operation] = []
        self.sums: dict[int, tf.Tensor] = {}
        self.event = -1  # index of the instruction that is being written
        self.sends: list[tuple[int, Instruction]] = []  # that follow the call
        self.after: Instruction | None = None  # the one that is being written
        self.ops = _ops_if_built(is_alone=len(inputs.peers) == 1)
        self.call_type = _call_type(self.ops)
        self.called: list[Any] = []
        self.calls = {
            stage: [(piece, self._calls(function)) for piece, function in pieces]
            for stage, pieces in inputs.functions.items()
        }
        self.adders: dict[tuple[int, ...], graphs.Calls] = {}
        self.returned: dict[int, tuple[int, ...]] = {}
        self.summed: dict[int, int] = {}
        self.last.append(_turn().assign_add(1, read_value=False))
        self._mark_run("run_begin")
        self._feed(values)

    def run(self) -> list[tf.Tensor]:
        write = {
            Operation.POST: self._post,
            Operation.WAIT: self._wait,
            Operation.CALL: self._call,
        }
        instructions = list(enumerate(self.inputs.program.instructions))
        for place, (self.event, instruction) in enumerate(instructions):
            if instruction.operation is Operation.SEND:  # written with its call
                continue
            self.sends = list(
                itertools.takewhile(
                    lambda each: each[1].operation is Operation.SEND,
                    instructions[place + 1 :],
                )
            )
            self.after = next((each for _, each in instructions[place + 1 :]), None)
            with tf.control_dependencies(self.last):
                write[instruction.operation](instruction)
            assert not self.sends, "messages follow the call that makes them"
        if any(each.channel for each in self.inputs.program.instructions):
            # Also without sends: what was received on a GPU may fail after its wait.
            with tf.control_dependencies(self.last):
                self.last = [self.ops.send_flush()]
        self._mark_run("run_end", [f.name for f in self.called])
        return self._outputs()

    # --- instructions

    def _call(self, instruction: Instruction) -> None:
        made, event = self.made[instruction.mb], self.event
        for index, (piece, call) in enumerate(self.calls[instruction.stage]):
            self.event = event
            fed = [made[name] for name in (*piece.inputs, *piece.arguments)]
            with tf.control_dependencies(self.last):
                outputs = call(*fed, **(self._recorded() if self.call_type else {}))
            self.last = [outputs[0].op]
            made.update(zip(piece.outputs, outputs))
            # At once, before its gradients are added: another rank may be waiting.
            self._send_made()
            self._add_up(instruction, index)

    def _send_made(self) -> None:
        """Send what is there of what follows the call: all of it when it is over."""
        def is_made(send: Instruction) -> bool:
            return _channel(send).tensor in self.made[send.mb]

        there = [each for each in self.sends if is_made(each[1])]
        self.sends = [each for each in self.sends if not is_made(each[1])]
        following = [send for _, send in there[1:]]
        for (self.event, send), after in itertools.zip_longest(there, following):
            with tf.control_dependencies(self.last):
                self._send(send, more=self._go_together(send, after))

    def _add_up(self, instruction: Instruction, piece: int) -> None:
        """Add the gradients that a piece returned to their running sums."""
        returns, made = self.inputs.graph.returns, self.made[instruction.mb]
        for positions in self.inputs.sum_groups[instruction.stage][piece]:
            values = [made[returns[position]] for position in positions]
            if positions[0] in self.sums:
                with tf.control_dependencies(self.last):
                    values = self._add(positions, values)
                self.last = list(dict.fromkeys(value.op for value in values))
            self.sums.update(zip(positions, values, strict=True))

    def _add(
        self, positions: tuple[int, ...], values: list[tf.Tensor]
    ) -> list[tf.Tensor]:
        sums = [self.sums[position] for position in positions]
        if len(sums) <= FEW_ADDS:
            return _add_all(*sums, *values)
        if positions not in self.adders:
            specs = [tf.TensorSpec(each.shape, each.dtype) for each in sums + values]
            self.adders[positions] = self._calls(noinline(_add_all, specs))
        return self.adders[positions](*sums, *values)

    def _send(self, instruction: Instruction, more: bool) -> None:
        channel = _channel(instruction)
        with self._device(channel):
            sent = self.ops.send_post(
                self.made[instruction.mb][channel.tensor],
                peer=self.inputs.peers[channel.peer],
                channel=channel.number,
                shape=_shape(channel.spec.shape),
                label=_label(instruction),
                more=more,
                **self._recorded(),
            )
        self.last = [sent]

    def _post(self, instruction: Instruction) -> None:
        more = self._go_together(instruction, self.after)
        with self._device(_channel(instruction)):
            self.last = [self.ops.recv_post(more=more, **self._receive(instruction))]

    def _wait(self, instruction: Instruction) -> None:
        with self._device(_channel(instruction)):
            value = self.ops.recv_wait(**self._receive(instruction))
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
            **self._recorded(),
        }

    def _device_of(self, channel: Channel) -> str:
        peer = self.inputs.peers[channel.peer]
        return self.inputs.device_of(channel.spec.dtype, peer)

    def _device(self, channel: Channel) -> contextlib.AbstractContextManager[Any]:
        device = self._device_of(channel)
        return tf.device(device) if device else contextlib.nullcontext()

    def _go_together(self, one: Instruction, after: Instruction | None) -> bool:
        """Whether what follows at once goes the same way."""
        if after is None or not go_together(one, after):
            return False
        return self._device_of(_channel(one)) == self._device_of(_channel(after))

    def _calls(self, function: Any) -> graphs.Calls:
        self.called.append(function)
        without = unwanted_optimizers(function.graph)
        return graphs.Calls(function, self.call_type, without)

    # --- the timeline

    def _recorded(self) -> dict[str, int]:
        """As what the timeline records the operation that is being written."""
        return {"program": self.inputs.number, "event": self.event}

    def _mark_run(self, mark: str, *more: Any) -> None:
        if self.ops is not None:
            with tf.control_dependencies(self.last):
                self.last = [getattr(self.ops, mark)(self.inputs.number, *more)]

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
        if argument.feed is Feed.WHOLE:
            return [value] * self.count
        if value.shape.rank is None or value.shape[argument.axis] is None:
            value = self._checked(argument, value)
        if self.count == 1:
            return [value]
        pieces = tf.split(value, self.count, axis=argument.axis)
        for piece in pieces:
            piece.set_shape(argument.microbatch.shape)
        return pieces

    def _checked(self, argument: TensorArgument, value: tf.Tensor) -> tf.Tensor:
        """``value``, if its size, known at run time only, divides into microbatches."""
        size = tf.shape(value)[argument.axis]
        check = tf.debugging.Assert(
            tf.logical_and(size > 0, tf.equal(size % self.count, 0)),
            [
                "MicrobatchError: a batch must divide into microbatches of equal,"
                f" non-zero size: argument={argument.name!r} axis={argument.axis}"
                f" microbatches={self.count} size=",
                size,
            ],
        )
        with tf.control_dependencies([check]):
            return tf.identity(value)

    def _outputs(self) -> list[tf.Tensor]:
        flat: list[tf.Tensor] = []
        ranks = self.inputs.plan.return_stage
        with tf.control_dependencies(self.last):
            for position, tensor in enumerate(self.inputs.graph.returns):
                if self.inputs.program.pp_rank not in ranks[tensor]:
                    continue
                start = len(flat)
                flat += [made[tensor] for made in self.made]
                self.returned[position] = tuple(range(start, len(flat)))
                if position in self.sums:
                    self.summed[position] = len(flat)
                    flat.append(self.sums[position])
                else:
                    flat[start:] = map(tf.identity, flat[start:])
        return flat


def _add_all(*tensors: tf.Tensor) -> list[tf.Tensor]:
    half = len(tensors) // 2
    return [a + b for a, b in zip(tensors[:half], tensors[half:], strict=True)]


@functools.cache
def _turn() -> tf.Variable:
    """What the steps of this process write, each when it begins."""
    with tf.init_scope(), tf.device("CPU:0"):
        # Not tf.Variable: no variable creator of the script has a say in it.
        return initial_values.ResourceVariable(
            0, dtype=tf.int64, trainable=False, name="smp_turn"
        )


def _ops_if_built(is_alone: bool) -> Any:
    """Our operations; None in a single process without the compiled library, which
    needs none of them."""
    from smp_tf.transport import ops

    try:
        ops.load()
    except TransportError:
        if not is_alone:
            raise
        return None
    return ops


def _call_type(ops: Any) -> str:
    """What calls segments: our operation, or "", TensorFlow's own. That one also moves
    inputs and outputs between devices."""
    if ops is None or tf.config.get_visible_devices("GPU"):
        return ""
    return str(ops.CALL)


def _channel(instruction: Instruction) -> Channel:
    assert instruction.channel is not None  # POST, WAIT and SEND always have one
    return instruction.channel


def _shape(shape: tuple[int | None, ...] | None) -> tf.TensorShape:
    return tf.TensorShape(shape)


def _label(instruction: Instruction) -> str:
    return (
        f"stage {instruction.stage} microbatch {instruction.mb}"
        f" {_channel(instruction).tensor}"
    )
