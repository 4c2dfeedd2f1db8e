"""The operations for messages that the emitter writes, and what depends on them."""

import types
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from smp_tf.plan.graph import TensorSpec
from smp_tf.plan.program import Channel, Instruction, Operation, Program
from smp_tf.runtime.emit import EmitInputs, emit

SPEC = TensorSpec("float32", (4,))
POST, WAIT = Operation.POST, Operation.WAIT


def message(
    operation: Operation, number: int, mb: int = 0, stage: int = 1, dtype: str = ""
) -> Instruction:
    spec = TensorSpec(dtype, (4,)) if dtype else SPEC
    return Instruction(operation, stage, mb, Channel(number, f"x{number}:0", 1, spec))


def emitted(
    instructions: Sequence[Instruction],
    returns: Sequence[str] = (),
    device_of: Any = lambda dtype, peer: "",
) -> Any:
    """The graph of rank 0 of two; microbatches: as many as there are."""
    count = 1 + max((each.mb for each in instructions), default=0)
    graph: Any = types.SimpleNamespace(returns=tuple(returns), arguments=())
    plan: Any = types.SimpleNamespace(return_stage={name: {0: 0} for name in returns})
    inputs = EmitInputs(
        graph=graph,
        plan=plan,
        program=Program(0, count, tuple(instructions)),
        functions={},
        arguments=(),
        values=(),
        sum_groups={},
        peers=(0, 1),
        device_of=device_of,
    )
    return emit(inputs).function.graph


def of_type(graph: Any, kind: str) -> list[tf.Operation]:
    return [op for op in graph.get_operations() if op.type == kind]


def all_before(op: tf.Operation) -> set[tf.Operation]:
    """What an operation depends on."""
    found: set[tf.Operation] = set()
    open_ = [op]
    while open_:
        each = open_.pop()
        for other in [*each.control_inputs, *(tensor.op for tensor in each.inputs)]:
            if other not in found:
                found.add(other)
                open_.append(other)
    return found


def test_receives_of_one_call_go_together() -> None:
    """As a group, which has one end: not those of two microbatches, or stages."""
    numbers = [(0, 0, 1), (1, 0, 1), (2, 1, 1), (3, 1, 2), (4, 1, 2)]
    posts = [message(POST, number, mb, stage) for number, mb, stage in numbers]
    graph = emitted([*posts, *(message(WAIT, *each) for each in numbers)])
    assert [op.get_attr("more") for op in of_type(graph, "SmpRecvPost")] == [
        *(True, False, False, True, False)
    ]


def test_what_stands_on_another_device_goes_alone() -> None:
    instructions = [message(POST, 0), message(POST, 1, dtype="int32")]
    graph = emitted(
        [*instructions, message(WAIT, 0), message(WAIT, 1, dtype="int32")],
        device_of=lambda dtype, peer: "CPU:0" if dtype == "int32" else "",
    )
    assert not any(op.get_attr("more") for op in of_type(graph, "SmpRecvPost"))


def test_a_rank_that_only_receives_flushes_too() -> None:
    """A receive on a GPU may fail after it was waited for; the flush tells so."""
    graph = emitted([message(POST, 0), message(WAIT, 0)], returns=["x0:0"])
    (flush,) = of_type(graph, "SmpSendFlush")
    (wait,) = of_type(graph, "SmpRecvWait")
    assert wait in all_before(flush)
    (returned,) = graph.outputs
    assert flush in all_before(returned.op)
    assert flush in {op for end in graph.control_outputs for op in all_before(end)}


def test_a_rank_without_messages_does_not_flush() -> None:
    assert not of_type(emitted([]), "SmpSendFlush")
