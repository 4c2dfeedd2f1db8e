"""Trace a step function for one microbatch and describe it as a ``plan.Graph``."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.errors import TraceError
from smp_tf.frontend.bodies import shape_of, specs_of, with_bodies
from smp_tf.frontend.hooks import graphs, recording, self_test
from smp_tf.frontend.returns import Returns, describe_returns
from smp_tf.frontend.writes import Writes
from smp_tf.plan.graph import (
    Graph,
    Node,
    TensorSpec,
    Variable,
    short_hash,
    sort_topologically,
)

# Attributes that may differ between processes, or between ranks, without changing what
# is computed together: seeds (each random operation runs on one rank), and our own
# marks.
_NOT_COMPARED = {"seed", "seed2", "_class", *recording.ATTRIBUTES}

# They name what they found wrong; automatic names differ where a script builds one more
# model on one rank.
_TEXT_READERS = {"Assert", "PrintV2", "StringFormat"}


@dataclasses.dataclass(frozen=True)
class StepTrace:
    """A traced step: the plain ``graph``, and the TensorFlow objects it stands for.

    Attributes:
        func_graph: where segments are cut from.
        captured: placeholder node name -> the tensor outside that it stands for.
        variables: aligned with ``graph.variables``.
        models: distributed models that were called.
        returns: structure of what the step returns.
    """

    graph: Graph
    func_graph: tf.Graph
    captured: Mapping[str, tf.Tensor]
    variables: tuple[tf.Variable, ...]
    models: tuple[Any, ...]
    returns: Returns


def trace_step(
    function: Callable[..., Any],
    specs: Sequence[tf.TensorSpec],
    call: Callable[[Callable[..., Any], Sequence[tf.Tensor]], Any],
    *,
    autograph: bool = True,
) -> StepTrace:
    """Trace ``function`` once, forward, loss and backward together.

    Args:
        specs: the tensors of one microbatch.
        call: given the function and symbolic tensors for ``specs``, puts them where the
            user's arguments had them and calls.
        autograph: convert the function with AutoGraph, as tf.function does.

    Raises:
        TraceError: the step uses a tensor of an enclosing function, calls no
            DistributedModel, or returns nothing that depends on one.
    """
    self_test.run()
    recorder = recording.Recorder()
    found: list[Returns] = []
    converted = graphs.with_autograph(function) if autograph else function

    def body(*tensors: tf.Tensor) -> list[tf.Tensor]:
        recorder.graph = tf.compat.v1.get_default_graph()
        returns, flat = describe_returns(call(converted, tensors), recorder)
        found.append(returns)
        return flat

    with graphs.outside_of_graphs(), recording.tracing(recorder):
        func_graph = graphs.trace_function("smp_step", body, specs)
    name = getattr(function, "__name__", "step")
    if not recorder.models:
        raise TraceError(
            f"a step must call a DistributedModel: step={name} called none; call it"
            " inside the decorated function, or use tf.function for a step without a"
            " model"
        )
    captured = {inside.op.name: outside for outside, inside in func_graph.captures}
    _refuse_outer_tensors(name, captured)
    variables, described = _describe_variables(recorder.models, func_graph, captured)
    graph = _describe(func_graph, recorder, captured, variables, described, found[-1])
    _check_depends_on_model(name, graph)
    return StepTrace(
        graph, func_graph, captured, variables, tuple(recorder.models), found[-1]
    )


def _refuse_outer_tensors(step: str, captured: Mapping[str, tf.Tensor]) -> None:
    for tensor in captured.values():
        if not hasattr(tensor, "numpy"):
            raise TraceError(
                "a step must not use tensors of the function around it other than"
                f" through its arguments: step={step} tensor={tensor.name!r}; pass it"
                " as an argument (and name it in non_split_inputs if it has no batch"
                " axis)"
            )


def _describe_variables(
    models: Sequence[Any],
    func_graph: tf.Graph,
    captured: Mapping[str, tf.Tensor],
) -> tuple[tuple[tf.Variable, ...], tuple[Variable, ...]]:
    """All variables of the models, then the others that the step touches."""
    placeholder = {id(outside): name for name, outside in captured.items()}
    seen: dict[int, tuple[tf.Variable, Variable]] = {}

    # As Keras says it: a frozen layer's variables keep their own ``trainable``.
    trained = {
        id(variable.handle)
        for model in models
        for variable in model.global_trainable_variables
    }

    def add(variable: tf.Variable, in_model: bool) -> None:
        if id(variable.handle) not in seen:
            spec = TensorSpec(variable.dtype.name, shape_of(variable.shape))
            name = placeholder.get(id(variable.handle), "")
            trainable = id(variable.handle) in trained
            described = Variable(variable.name, spec, trainable, in_model, name)
            seen[id(variable.handle)] = (variable, described)

    # A metric is an attribute of the model, and yet every rank has it.
    counted = {
        id(variable.handle)
        for model in models
        for metric in model.metrics
        for variable in metric.variables
    }
    for model in models:
        for variable in model.global_variables:
            add(variable, id(variable.handle) not in counted)
    # TensorFlow keeps them in a set, in another order in each process.
    captures = {id(outside): i for i, outside in enumerate(captured.values())}
    for variable in sorted(
        func_graph.variables, key=lambda v: captures.get(id(v.handle), len(captures))
    ):
        add(variable, False)
    return tuple(v for v, _ in seen.values()), tuple(d for _, d in seen.values())


def _describe(
    func_graph: tf.Graph,
    recorder: recording.Recorder,
    captured: Mapping[str, tf.Tensor],
    variables: tuple[tf.Variable, ...],
    described: tuple[Variable, ...],
    returns: Returns,
) -> Graph:
    operations = func_graph.get_operations()
    graph_def = func_graph.as_graph_def()
    defs = {node_def.name: node_def for node_def in graph_def.node}
    digests = _Digests(graph_def)
    writes = Writes(
        graph_def.library, lambda op: func_graph.op_def_for_type(op).is_stateful
    )
    nodes = [_node(each, defs[each.name], digests, writes) for each in operations]
    must_run = {operation.name for operation in func_graph.control_outputs}
    index = {id(variable.handle): i for i, variable in enumerate(variables)}
    gradient_of = {}
    for sources, results in recorder.gradients:
        for source, result in zip(sources, results, strict=True):
            handle = id(getattr(source, "handle", None))
            if result is None or handle not in index:
                continue
            for tensor in tf.nest.flatten(result, expand_composites=True):
                gradient_of[tensor.name] = index[handle]
    for leaf in returns.leaves:
        if leaf.variable is not None and id(leaf.variable.handle) in index:
            for component in leaf.components:
                gradient_of[func_graph.outputs[component].name] = index[
                    id(leaf.variable.handle)
                ]
    return Graph(
        nodes=sort_topologically(with_bodies(nodes, operations)),
        arguments=tuple(t.name for t in func_graph.inputs if t.op.name not in captured),
        captures=tuple(captured),
        variables=described,
        losses=tuple(
            dict.fromkeys(t.name for t in recorder.losses if t.graph is func_graph)
        ),
        returns=tuple(t.name for t in func_graph.outputs),
        gradient_of=gradient_of,
        effects=tuple(
            op.name for op in operations if op.name in must_run and op.type != "NoOp"
        ),
    ).without_dead_nodes()


def _node(
    operation: tf.Operation, node_def: Any, digests: "_Digests", writes: Writes
) -> Node:
    pin = (
        node_def.attr[recording.PARTITION].i
        if recording.PARTITION in node_def.attr
        else None
    )
    return Node(
        name=operation.name,
        op=operation.type,
        inputs=tuple(tensor.name for tensor in operation.inputs),
        controls=tuple(control.name for control in operation.control_inputs),
        outputs=specs_of(operation.outputs),
        is_stateful=bool(operation.op_def.is_stateful),
        layer=recording.read_attribute(node_def, recording.LAYER),
        forward=recording.read_attribute(node_def, recording.FORWARD),
        is_gradient=recording.GRADIENT in node_def.attr,
        pin=pin,
        writes=writes.of_operation(operation, node_def),
        colocated=tuple(
            group.decode().removeprefix("loc:@")
            for group in operation.colocation_groups()
            if group.decode() != f"loc:@{operation.name}"
        ),
        digest=digests.of_node(node_def),
    )


class _Digests:
    """Hashes of operations, the same in every process.

    Library functions (loop bodies, branches, Keras RNNs) count by their content, for
    their names hold process-local numbers. So do the texts of assertions and prints.
    """

    def __init__(self, graph_def: Any) -> None:
        self._library = {f.signature.name: f for f in graph_def.library.function}
        self._known: dict[str, str] = {}
        bodies = [graph_def.node, *(f.node_def for f in graph_def.library.function)]
        self._texts = {
            name.partition(":")[0]
            for body in bodies
            for node in body
            if node.op in _TEXT_READERS
            for name in node.input
        }

    def of_node(self, node_def: Any) -> str:
        """Hash of a NodeDef's attributes."""
        parts = []
        for key in sorted(node_def.attr):
            value = node_def.attr[key]
            called = [value.func] if value.HasField("func") else value.list.func
            if key in _NOT_COMPARED:
                continue
            if key == "value" and self._is_text(node_def):
                continue
            if called:
                parts.append(f"{key}={[self._of_function(f.name) for f in called]}")
            elif not key.startswith("_"):
                parts.append(f"{key}={value.SerializeToString(deterministic=True)!r}")
        return short_hash("\n".join(parts))

    def _is_text(self, node_def: Any) -> bool:
        is_string = node_def.attr["dtype"].type == tf.string.as_datatype_enum
        return is_string and node_def.name in self._texts

    def _of_function(self, name: str) -> str:
        if name not in self._known:
            self._known[name] = ""  # for a function that calls itself
            nodes = self._library[name].node_def if name in self._library else ()
            content = [f"{node.op} {self.of_node(node)}" for node in nodes]
            self._known[name] = short_hash("\n".join(content))
        return self._known[name]


def _check_depends_on_model(step: str, graph: Graph) -> None:
    # Data only: TensorFlow lets every returned value wait for all stateful operations.
    # Gradients count, for that of a linear model does not need the model's output.
    needed = graph.ancestors(graph.returns, with_controls=False)
    nodes = map(graph.by_name.__getitem__, needed)
    if not any(node.layer or node.is_gradient for node in nodes):
        raise TraceError(
            "the result of a step must depend on the output of a DistributedModel:"
            f" step={step} returns values that do not; return a loss, predictions or"
            " gradients (or use tf.function for a step without a model)"
        )
