"""Random operations of a segment that draw from a counter in a variable.

The kernel of a stateful random operation keeps its counter for itself, where no
checkpoint reaches it: Keras's default Dropout has one. What replaces it draws the same
numbers, bit for bit, from a variable:

    RandomUniform(shape)  -->  state = RngReadAndSkip(counter, elements of the shape)
                               StatelessRandomUniformV2(shape, key and counter in state)

Both are Philox with the first seed as the key and the second one as the upper half of
the counter, and both leave 256 numbers for each element, see TensorFlow's
``guarded_philox_random.h`` and ``stateful_random_ops_cpu_gpu.h``.

Operations of other types stay as they are (``tf.random.categorical``, ``gamma``,
``shuffle``), and so do those inside of functions, branches and loops, to which no
variable of ours leads: a restart begins with their first numbers again.
"""

from collections.abc import Callable, Iterable
from typing import Any

import tensorflow as tf
from tensorflow.core.framework import graph_pb2, node_def_pb2

STATELESS = {
    "RandomUniform": "StatelessRandomUniformV2",
    "RandomStandardNormal": "StatelessRandomNormalV2",
    "TruncatedNormal": "StatelessTruncatedNormalV2",
    "RandomUniformInt": "StatelessRandomUniformIntV2",
}

PHILOX = 1  # tf.random.Algorithm

MakeCounter = Callable[[str, int, int], tf.Variable]
"""(which operation of the trace, its two seeds) -> int64[3]: lower and upper half of
the counter, key."""


class CountedDraws:
    """The random operations of a traced step.

    Args:
        graph: of the step. Its operations are told apart by their type and place: their
            names depend on what else was built in the process.
    """

    def __init__(self, graph: tf.Graph, make_counter: MakeCounter) -> None:
        self._graph, self._make_counter = graph, make_counter
        draws = [each for each in graph.get_operations() if each.type in STATELESS]
        self._label = {each.name: f"{i} {each.type}" for i, each in enumerate(draws)}

    def replace(self, graph_def: graph_pb2.GraphDef) -> dict[str, tf.Variable]:
        """Replace those in a part of the graph; outputs keep their names.

        Returns:
            Tensors that ``graph_def`` lacks now -> variables whose resources they are.
        """
        counters: dict[str, tf.Variable] = {}
        nodes: list[Any] = []
        for node in graph_def.node:
            if node.name not in self._label:
                nodes.append(node)
                continue
            shape = self._graph.get_tensor_by_name(f"{node.name}:0").shape
            nodes += _from_counter(node, shape.num_elements())
            counters[f"{node.name}/smp_counter:0"] = self._make_counter(
                self._label[node.name], node.attr["seed"].i, node.attr["seed2"].i
            )
        if counters:
            versions, library = graph_def.versions, graph_def.library
            graph_def.CopyFrom(
                graph_pb2.GraphDef(versions=versions, library=library, node=nodes)
            )
        return counters


def _from_counter(node: Any, num_elements: int | None) -> list[Any]:
    """The NodeDefs that stand for a stateful one, the last with its name."""
    made: list[Any] = []

    def add(op: str, name: str, inputs: Iterable[str], **types: tf.DType) -> str:
        new = node_def_pb2.NodeDef(op=op, name=f"{node.name}/smp_{name}", input=inputs)
        for key, dtype in types.items():
            new.attr[key].type = dtype.as_datatype_enum
        made.append(new)
        return new.name

    def constant(name: str, value: Any, dtype: tf.DType) -> str:
        named = add("Const", name, [], dtype=dtype)
        proto = tf.make_tensor_proto(value, dtype)
        made[-1].attr["value"].tensor.CopyFrom(proto)
        return named

    shape, *bounds = (name for name in node.input if not name.startswith("^"))
    after = [name for name in node.input if name.startswith("^")]
    shape_type = tf.as_dtype(node.attr["T"].type)
    first_axis = constant("first_axis", 0, tf.int32)
    if num_elements is not None:
        count = constant("count", num_elements, tf.uint64)
    else:
        sizes = add("Cast", "sizes", [shape], SrcT=shape_type, DstT=tf.int64)
        product = add(
            "Prod", "product", [sizes, first_axis], T=tf.int64, Tidx=tf.int32
        )
        count = add("Cast", "count", [product], SrcT=tf.int64, DstT=tf.uint64)
    philox = constant("philox", PHILOX, tf.int32)
    state = add(
        "RngReadAndSkip", "state", [f"{node.name}/smp_counter", philox, count, *after]
    )
    words = add("Bitcast", "words", [state], T=tf.int64, type=tf.uint64)
    lengths = constant("lengths", [2, 1], tf.int64)
    parts = add("SplitV", "parts", [words, lengths, first_axis], T=tf.uint64)
    made[-1].attr["Tlen"].type = tf.int64.as_datatype_enum
    made[-1].attr["num_split"].i = 2

    given = [shape, f"{parts}:1", parts, philox, *bounds, *after]
    add(STATELESS[node.op], "drawn", given, Tshape=shape_type)
    made[-1].name = node.name
    made[-1].attr["dtype"].CopyFrom(node.attr["Tout" if bounds else "dtype"])
    return made
