"""Segments that XLA compiles.

    call of a segment --> random numbers, drawn by TensorFlow's own kernels --+
                      --> all the rest: one function that XLA compiles  <-----+

XLA draws other random numbers than TensorFlow, and not from the script's seeds. So what
draws them stays outside: dropout is the same with XLA and without, on any number of
ranks, and where one segment draws again what another one has drawn.

Which segments can be compiled is known when the step is built: XLA translates each one,
for its static shapes. Then it runs once on zeros, so that all ranks compile at the same
time and before any of them waits for another; the variables that it writes get their
values back. A loop might not end with zeros: a segment that has one is compiled twice,
to see that it can be, and in its first call.

A segment that cannot be compiled runs as without XLA, and the log says why. No other
rank need know: what a segment takes and gives is the same.
"""

import contextlib
import logging
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from smp_tf.config import Config
from smp_tf.errors import SmpError
from smp_tf.frontend.hooks import graphs, initial_values
from smp_tf.frontend.trace import StepTrace
from smp_tf.plan.graph import node_of
from smp_tf.plan.segment import Segment
from smp_tf.runtime.lower import noinline
from smp_tf.runtime.random_part import (
    find_random_part,
    importer,
    library_of,
    types_inside,
)

logger = logging.getLogger("smp_tf")

_LOOPS = {"While", "StatelessWhile", "For", "NextIteration"}
_FOREIGN = (tf.string, tf.variant, tf.resource)
_WORKSPACE_OF = "FusedBatchNormV3"

# What TensorFlow writes around the reason.
_AROUND = re.compile(
    r"^Failed getting HLO text: '"
    r"|Detected unsupported operations when trying to compile graph \S+ on \S+ "
    r"|\{\{node [^}]*\}\}$"
)
_SHOWN = 300  # characters of a reason


def is_wanted(config: Config) -> bool:
    """Whether the segments of a step that is built now shall be compiled: the key
    ``xla`` says so, or ``tf.config.optimizer.set_jit(True)`` was called."""
    return config.xla or bool(tf.config.optimizer.get_jit())


def compile_segments(
    trace: StepTrace,
    functions: Mapping[int, Sequence[tuple[Segment, Any]]],
    step: str,
) -> dict[int, list[tuple[Segment, Any]]]:
    """What XLA can compile is compiled; all else stays as it is.

    Args:
        functions: as ``lower_segments`` gives them. Their variables have values.
        step: what the log calls it.
    """
    begin = time.perf_counter()
    done: dict[int, list[tuple[Segment, Any]]] = {}
    num_compiled = 0
    with graphs.outside_of_graphs(), graphs.without_tapes():
        for stage, pieces in functions.items():
            done[stage], reasons = [], []
            for piece, function in pieces:
                try:
                    function = _compiled(trace, piece, function)
                except Exception as error:  # whatever it is: without XLA it can run
                    reasons.append(reason_of(error))
                done[stage].append((piece, function))
            if reasons:
                _tell(step, pieces[0][0], reasons, len(pieces))
            else:
                num_compiled += 1
    logger.info(
        "xla: step=%s: %d of %d segments compiled in %.1f s",
        step,
        num_compiled,
        len(functions),
        time.perf_counter() - begin,
    )
    return done


def _tell(step: str, piece: Segment, reasons: Sequence[str], num_pieces: int) -> None:
    part = f" in {len(reasons)} of its {num_pieces} pieces" if num_pieces > 1 else ""
    logger.warning(
        "xla: step=%s stage=%d kind=%s partition=%d runs without XLA%s: %s",
        step,
        piece.stage,
        piece.kind.value,
        piece.partition,
        part,
        reasons[0],
    )


def reason_of(error: Exception) -> str:
    """The first line of an error that says something, without what is around it."""
    lines = (_AROUND.sub("", line).strip() for line in str(error).splitlines())
    said = next((line for line in lines if line), type(error).__name__)
    return said if len(said) <= _SHOWN else f"{said[:_SHOWN]}..."


def _compiled(trace: StepTrace, segment: Segment, function: Any) -> Any:
    """A ConcreteFunction that does what ``function`` does, compiled and ready.

    Raises:
        Exception: it cannot be compiled; any kind.
    """
    graph = function.graph
    graph_def = graph.as_graph_def()
    names = [*segment.inputs, *segment.arguments]
    fed = graph.inputs[: len(names)]
    _require_static(trace, segment, dict(zip(names, fed, strict=True)), graph.outputs)
    random = find_random_part(graph, graph_def)
    outputs = [tensor.name for tensor in graph.outputs]
    from_random = [name for name in outputs if node_of(name) in random.nodes]
    from_rest = [name for name in outputs if node_of(name) not in random.nodes]
    known = _known(trace, names, graph)
    taken = [tensor for tensor in fed if tensor.name not in known] + list(random.drawn)
    run_part = importer(graph, graph_def)

    def rest(*values: tf.Tensor) -> list[tf.Tensor]:
        feeds = dict(zip((each.name for each in taken), values, strict=True))
        feeds.update((name, tf.constant(value)) for name, value in known.items())
        made = run_part(lambda name: name not in random.nodes, feeds, from_rest)
        return made or [tf.constant(0)]

    rest.__name__ = graph.name
    specs = _specs(taken)
    compiled = tf.function(rest, autograph=False, jit_compile=True)
    types = types_inside(graph_def.node, library_of(graph_def))
    has_loops = not types.isdisjoint(_LOOPS)
    level = "optimized_hlo_serialized" if has_loops else "hlo_serialized"
    compiled.experimental_get_compiler_ir(*specs)(stage=level)
    call_rest = compiled.get_concrete_function(*specs)

    def whole(*values: tf.Tensor) -> list[tf.Tensor]:
        feeds = dict(zip((each.name for each in fed), values, strict=True))
        if random.nodes:
            constants = {k: tf.constant(value) for k, value in random.constants.items()}
            drawn = [each.name for each in random.drawn] + from_random
            made = run_part(random.nodes.__contains__, {**feeds, **constants}, drawn)
            feeds.update(zip(drawn, made, strict=True))
        made = call_rest(*[feeds[each.name] for each in taken])
        feeds.update(zip(from_rest, made))
        return [feeds[name] for name in outputs]

    if not has_loops:
        _run_on_zeros(trace, segment, call_rest, specs)
    whole.__name__ = graph.name
    return noinline(whole, _specs(fed))


def _specs(tensors: Sequence[tf.Tensor]) -> list[tf.TensorSpec]:
    return [tf.TensorSpec(tensor.shape, tensor.dtype) for tensor in tensors]


def _require_static(
    trace: StepTrace,
    segment: Segment,
    inputs: Mapping[str, tf.Tensor],
    outputs: Sequence[tf.Tensor],
) -> None:
    """Refuse what XLA would compile again in the middle of training, or cannot pass.

    A function is compiled for the shapes of its inputs when it is called with them, and
    only then it is known whether it can be.
    """
    checked: list[tuple[str, Any]] = []
    for name in segment.captures:
        if name in trace.graph.variable_of:
            variable = trace.variables[trace.graph.variable_of[name]]
            checked.append((f"variable {variable.name}", variable))
    for name, tensor in [*inputs.items(), *zip(segment.outputs, outputs)]:
        what = f"tensor {name}"
        if name in segment.arguments:
            what = f"tensor {trace.graph.arguments.index(name)} of the step's arguments"
        if not _is_workspace(trace, name):
            checked.append((what, tensor))
    for what, each in checked:
        if each.dtype in _FOREIGN:
            raise SmpError(f"{what} holds {each.dtype.name}")
        if not each.shape.is_fully_defined():
            raise SmpError(f"{what} has no static shape: {each.shape}")


def _is_workspace(trace: StepTrace, tensor: str) -> bool:
    """Whether a tensor is what batch normalization keeps for cuDNN: its shape is
    unknown, and XLA neither fills nor reads it. Most transformers have it, too: Keras
    normalizes a layer with the same operation."""
    node = trace.graph.by_name.get(node_of(tensor))
    return node is not None and node.op == _WORKSPACE_OF and tensor.endswith(":5")


def _known(trace: StepTrace, names: Sequence[str], graph: Any) -> dict[str, Any]:
    """Placeholder of ``graph`` -> its value, where it is known or does not matter.

    XLA must know the whole numbers that shapes are made of.
    """
    outside = [trace.func_graph.get_tensor_by_name(name) for name in names]
    pairs = [*zip(outside, graph.inputs), *graph.captures]
    found = {
        placeholder.name: graphs.static_value(tensor)
        for tensor, placeholder in pairs
        if tensor.dtype.is_integer and tensor.shape.rank in (0, 1)
    }
    found.update(
        (placeholder.name, np.zeros([0], placeholder.dtype.as_numpy_dtype))
        for name, placeholder in zip(names, graph.inputs)
        if _is_workspace(trace, name)
    )
    return {name: value for name, value in found.items() if value is not None}


def _run_on_zeros(
    trace: StepTrace, segment: Segment, function: Any, specs: Sequence[tf.TensorSpec]
) -> None:
    """Call a compiled function as the wrapper does, so that it is compiled for it."""
    written = {
        trace.graph.variable_of[node_of(tensor)]
        for name in segment.nodes
        for tensor in trace.graph.by_name[name].writes
        if node_of(tensor) in trace.graph.variable_of
    }
    with _values_kept([trace.variables[index] for index in sorted(written)]):
        noinline(lambda *values: function(*values), specs)(
            *[tf.zeros(spec.shape, spec.dtype) for spec in specs]
        )


@contextlib.contextmanager
def _values_kept(variables: Sequence[Any]) -> Iterator[None]:
    values = [initial_values.read_raw(variable) for variable in variables]
    try:
        yield
    finally:
        for variable, value in zip(variables, values, strict=True):
            initial_values.assign_raw(variable, value)
