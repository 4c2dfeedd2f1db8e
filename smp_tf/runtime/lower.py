"""Segments become TensorFlow functions."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import graph_pb2, types_pb2

from smp_tf.frontend.hooks import graphs, recording
from smp_tf.frontend.trace import StepTrace
from smp_tf.plan.segment import Segment
from smp_tf.runtime.counted_draws import CountedDraws, MakeCounter

# Never inlined: M inlined copies of a segment cost seconds of graph optimisation, and
# copies of a random operation with a fixed seed would all draw the same numbers.
_ATTRIBUTES = {"_noinline": True}


def lower_segments(
    trace: StepTrace,
    segments: Sequence[Segment],
    make_counter: MakeCounter | None = None,
) -> dict[int, list[tuple[Segment, Any]]]:
    """stage -> [(piece, ConcreteFunction(*inputs, *arguments) -> [*outputs])].

    Args:
        segments: or pieces of segments, in order.
        make_counter: of what random operations count with; without it their kernels
            count.

    A segment that only has effects returns one constant, so that there is always a
    tensor to wait for: a function that is not inlined publishes its outputs when all of
    it is done.
    """
    graph_def = trace.func_graph.as_graph_def()
    defs = {node.name: node for node in graph_def.node}
    functions: dict[int, list[tuple[Segment, Any]]] = {}
    draws: CountedDraws | None = None
    if make_counter is not None:
        draws = CountedDraws(trace.func_graph, make_counter)
    with graphs.outside_of_graphs():
        for segment in segments:
            part = graph_pb2.GraphDef(
                versions=graph_def.versions, library=graph_def.library
            )
            part.node.extend(_cut_out(defs, segment))
            counters = draws.replace(part) if draws is not None else {}
            function = _function(trace, segment, part, counters)
            functions.setdefault(segment.stage, []).append((segment, function))
    return functions


def _cut_out(defs: dict[str, Any], segment: Segment) -> list[Any]:
    """The segment's NodeDefs, without our marks and without edges that leave it.

    A control edge that leaves a segment needs no replacement: segments of a rank run in
    order, and control edges between ranks have nothing to order.
    """
    names = set(segment.nodes)
    nodes = []
    for name in segment.nodes:
        node = type(defs[name])()
        node.CopyFrom(defs[name])
        kept = [i for i in node.input if not i.startswith("^") or i[1:] in names]
        del node.input[:]
        node.input.extend(kept)
        for key in (*recording.ATTRIBUTES, "_class"):
            node.attr.pop(key, None)
        nodes += _in_order(node)
    return nodes


def _in_order(node: Any) -> list[Any]:
    """A sum of several tensors as a chain of additions, other nodes as they are.

    The kernel of AddN begins with whichever input it may overwrite. Which one that is
    differs between the cut graph and the whole one, and with it the last bits.
    """
    data = [name for name in node.input if not name.startswith("^")]
    if node.op != "AddN" or len(data) < 3:
        return [node]
    if node.attr["T"].type == types_pb2.DT_VARIANT:
        return [node]
    chain: list[Any] = []
    for i, name in enumerate(data[1:], 1):
        total = type(node)()
        total.CopyFrom(node)
        total.op = "AddV2"
        del total.attr["N"]
        is_last = i == len(data) - 1
        total.name = node.name if is_last else f"{node.name}/smp_sum_{i}"
        del total.input[:]
        total.input.extend([chain[-1].name if chain else data[0], name])
        total.input.extend(name for name in node.input if name.startswith("^"))
        chain.append(total)
    return chain


def _function(
    trace: StepTrace,
    segment: Segment,
    graph_def: Any,
    counters: Mapping[str, tf.Variable],
) -> Any:
    fed = [*segment.inputs, *segment.arguments]
    tensors = [trace.func_graph.get_tensor_by_name(name) for name in fed]

    def body(*values: tf.Tensor) -> list[tf.Tensor]:
        here = tf.compat.v1.get_default_graph()
        feeds: dict[str, tf.Tensor] = dict(zip(fed, values, strict=True))
        for name in segment.captures:
            feeds[f"{name}:0"] = here.capture(trace.captured[name])
        for name, counter in counters.items():
            feeds[name] = here.capture(counter.handle)
        outputs = tf.graph_util.import_graph_def(
            graph_def, input_map=feeds, return_elements=list(segment.outputs), name=""
        )
        graphs.keep_functions(trace.func_graph, here)
        return outputs or [tf.constant(0)]

    body.__name__ = f"stage_{segment.stage}_{segment.kind.value}"
    return noinline(body, [tf.TensorSpec(t.shape, t.dtype) for t in tensors])


def noinline(body: Callable[..., Any], specs: Sequence[tf.TensorSpec]) -> Any:
    """The ConcreteFunction of ``body``; each call of it stays one node."""
    function = tf.function(body, autograph=False, experimental_attributes=_ATTRIBUTES)
    return function.get_concrete_function(*specs)
