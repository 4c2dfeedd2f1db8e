"""Functions that TensorFlow would replace by others when it optimizes a graph.

Keras traces an LSTM or a GRU twice, for CPUs and for cuDNN. On a GPU TensorFlow puts
the function for cuDNN into the call, of the forward and of the backward alike
(grappler's ``implementation_selector``). The two hand other tensors from the forward to
the backward. In one graph that is no matter; between segments, what is handed over is
in the plan of every rank. So such a segment keeps the functions that were traced. A
forward without a backward, of an evaluation or a prediction, is left to TensorFlow.
"""

from typing import Any

from smp_tf.runtime.random_part import functions_inside, library_of

SELECTOR = "implementation_selector"
"""The field of RewriterConfig."""

_CALLS = frozenset({"PartitionedCall", "StatefulPartitionedCall"})
_PAIR = frozenset({"forward_function_name", "backward_function_name"})


def unwanted_optimizers(graph: Any) -> tuple[str, ...]:
    """Which of TensorFlow's optimizers must leave the FuncGraph of a segment alone."""
    if not any(operation.type in _CALLS for operation in graph.get_operations()):
        return ()
    graph_def = graph.as_graph_def()
    library = library_of(graph_def)
    for name in functions_inside(graph_def.node, library):
        attributes = library[name].attr.keys()
        if "api_implements" in attributes and _PAIR & set(attributes):
            return (SELECTOR,)
    return ()
