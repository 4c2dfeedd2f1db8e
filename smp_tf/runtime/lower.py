"""Segments become TensorFlow functions."""

from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import graph_pb2

from smp_tf.frontend import hooks
from smp_tf.frontend.trace import StepTrace
from smp_tf.plan.segment import Segment

# Never inlined: M inlined copies of a segment cost seconds of graph optimisation, and
# copies of a random operation with a fixed seed would all draw the same numbers.
_ATTRIBUTES = {"_noinline": True}


def lower_segments(trace: StepTrace, segments: Sequence[Segment]) -> dict[int, Any]:
    """stage -> ConcreteFunction(*inputs, *arguments) -> [*outputs], for ``segments``.

    A segment that only has effects returns one constant, so that there is always a
    tensor to wait for: a function that is not inlined publishes its outputs when all of
    it is done.
    """
    graph_def = trace.func_graph.as_graph_def()
    defs = {node.name: node for node in graph_def.node}
    functions = {}
    with hooks.outside_of_graphs():
        for segment in segments:
            part = graph_pb2.GraphDef(
                versions=graph_def.versions, library=graph_def.library
            )
            part.node.extend(_cut_out(defs, segment))
            functions[segment.stage] = _function(trace, segment, part)
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
        for key in (*hooks.ATTRIBUTES, "_class"):
            node.attr.pop(key, None)
        nodes.append(node)
    return nodes


def _function(trace: StepTrace, segment: Segment, graph_def: Any) -> Any:
    fed = [*segment.inputs, *segment.arguments]
    tensors = [trace.func_graph.get_tensor_by_name(name) for name in fed]

    def body(*values: tf.Tensor) -> list[tf.Tensor]:
        here = tf.compat.v1.get_default_graph()
        feeds: dict[str, tf.Tensor] = dict(zip(fed, values, strict=True))
        for name in segment.captures:
            feeds[f"{name}:0"] = here.capture(trace.captured[name])
        outputs = tf.graph_util.import_graph_def(
            graph_def, input_map=feeds, return_elements=list(segment.outputs), name=""
        )
        return outputs or [tf.constant(0)]

    body.__name__ = f"stage_{segment.stage}_{segment.kind.value}"
    function = tf.function(body, autograph=False, experimental_attributes=_ATTRIBUTES)
    specs = [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]
    return function.get_concrete_function(*specs)
