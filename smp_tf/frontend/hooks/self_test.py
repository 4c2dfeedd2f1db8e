"""The self-test of the private hooks: ``smp.init`` runs it, and the first trace.

A private place that moved or changed its ways would not raise: gradients would be cut
in the wrong places, weights would start from other numbers. So each hook is tried on a
small example first. Nothing here starts TensorFlow's runtime: after ``smp.init`` a
script may still choose its devices and threads.
"""

import re
from collections.abc import Callable
from typing import Any

import tensorflow as tf
from tensorflow.python.eager import context
from tf_keras.src import backend as keras_backend

from smp_tf.frontend.hooks import (
    applying,
    exporting,
    fitting,
    graphs,
    initial_values,
    kernels,
    loss_scales,
    optimizer_slots,
    recording,
    refusal,
    resuming,
    tracking,
)

_is_passed = False


def run() -> None:
    """Check once that every hook does what this library needs.

    Raises:
        TraceError: names the hook, this TensorFlow and the versions known to work.
    """
    global _is_passed
    if _is_passed:
        return
    for check in _CHECKS:
        failure = _failure(check)
        if failure:
            raise refusal(failure)
    _is_passed = True


def _failure(check: Callable[[], str]) -> str:
    """ "" or what is wrong."""
    try:
        return check()
    except Exception as error:  # whatever a changed TensorFlow may raise
        text = re.sub(r"\s+", " ", str(error))[:300]
        return f"{check.__name__.strip('_')}: {type(error).__name__}: {text}"


def _traced(
    function: Callable[[tf.Tensor], list[tf.Tensor]],
) -> tuple[recording.Recorder, list[Any]]:
    """(recorder, NodeDefs) of a function of one vector."""
    recorder = recording.Recorder()

    def body(x: tf.Tensor) -> list[tf.Tensor]:
        recorder.graph = tf.compat.v1.get_default_graph()
        return function(x)

    spec = tf.TensorSpec([2], tf.float32)
    with graphs.outside_of_graphs(), recording.tracing(recorder):
        graph = graphs.trace_function("smp_self_test", body, [spec])
    return recorder, list(graph.as_graph_def().node)


def _gradients() -> str:
    """The marks of layers and gradients, by tape and by tf.gradients."""

    class Probe(tf.keras.layers.Layer):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            return tf.sin(x, name="probed_sine")

    layer = Probe(name="probe", autocast=False)
    setattr(layer, recording.DISTRIBUTED_MARK, True)

    def step(x: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = layer(x)
        by_tape = tape.gradient(y, x)
        return [by_tape, *tf.gradients(y, x)]

    recorder, nodes = _traced(step)
    sine = next((node for node in nodes if node.op == "Sin"), None)
    cosines = [node for node in nodes if node.op == "Cos"]
    read = recording.read_attribute
    if sine is None or read(sine, recording.LAYER) != "probe":
        return "Layer.__call__ does not mark the operations of a layer"
    if recorder.models != [layer]:
        return "Layer.__call__ does not report the model"
    if len(recorder.losses) != 2 or len(recorder.gradients) != 2:
        return "GradientTape.gradient or tf.gradients does not report its call"
    if len(cosines) != 2 or any(recording.GRADIENT not in c.attr for c in cosines):
        return "gradient operations are not marked"
    if any(read(cosine, recording.FORWARD) != sine.name for cosine in cosines):
        return "gradient operations do not know their forward operation"
    return ""


def _custom_gradients() -> str:
    """record_operation: what brings its own backward function is marked too."""

    @tf.custom_gradient
    def clipped(x: tf.Tensor) -> Any:
        return tf.sinh(x), lambda dy: tf.tan(dy)

    def step(x: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = clipped(x)
        return [tape.gradient(y, x)]

    _, nodes = _traced(step)
    backward = [node for node in nodes if node.op == "Tan"]
    if len(backward) != 1 or not recording.read_attribute(
        backward[0], recording.FORWARD
    ):
        return "record_operation does not mark a custom gradient"
    return ""


def _functions_in_layers() -> str:
    """Function.__call__: a user's tf.function is written out."""
    inner = tf.function(lambda x: tf.cosh(x))

    class Probe(tf.keras.layers.Layer):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            return inner(x)

    layer = Probe(name="probe", autocast=False)
    setattr(layer, recording.DISTRIBUTED_MARK, True)
    _, nodes = _traced(lambda x: [layer(x)])
    ops = [node.op for node in nodes]
    if "Cosh" not in ops or any("PartitionedCall" in op for op in ops):
        return "Function.__call__ does not write out a tf.function inside a layer"
    return ""


def _tapes() -> str:
    """Tapes work after the graphs were left, and can be kept out."""
    found: list[str] = []

    def step(x: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            with graphs.without_tapes():
                y = tf.sin(x)
        if tape.gradient(y, x) is not None:
            found.append("stop_recording does not keep a call out of a tape")
        with graphs.outside_of_graphs(), tf.Graph().as_default():
            inside = tf.zeros([2])
            with tf.GradientTape() as tape:
                tape.watch(inside)
                y = tf.sin(inside)
            if tape.gradient(y, inside) is None:
                found.append("TapeSetRestartOnThread does not restart the tapes")
        return [x]

    spec = tf.TensorSpec([2], tf.float32)
    graphs.trace_function("smp_self_test", step, [spec])
    return found[0] if found else ""


def _repeated_calls() -> str:
    """Graph._create_op_internal: a call is like that of the function."""
    with tf.Graph().as_default() as graph:
        calls = graphs.Calls(_Called())
        x, y = tf.ones([2, 3]), tf.ones([2, 3])
        _, (second,) = calls(x, y), calls(y, x)
        wanted = (second.op.type, [t.name for t in second.op.inputs], second.shape)
        if wanted != ("AddV2", [y.name, x.name], [2, 3]) or second.graph is not graph:
            return "Graph._create_op_internal does not repeat an operation"
    return ""


class _Called:
    """In place of a ConcreteFunction, which would start TensorFlow's runtime."""

    captured_inputs = ()

    def add_to_graph(self, graph: Any) -> None:
        pass

    def __call__(self, *inputs: tf.Tensor) -> list[tf.Tensor]:
        return [tf.add(*inputs)]


def _seeds_of_initializers() -> str:
    """get_seed, and the states of the generators around it."""
    before = initial_values.RandomState()
    try:
        with tf.Graph().as_default(), initial_values.eager_seeds() as seeds:
            graph = graphs.trace_function(
                initial_values.INITIAL_VALUE, lambda: tf.random.uniform([2]), []
            )
    finally:
        before.restore()
    for node in graph.as_graph_def().node:
        if node.op == "RandomUniform":
            if [(node.attr["seed"].i, node.attr["seed2"].i)] != seeds:
                return "random_seed.get_seed does not give an operation its seeds"
            return ""
    return "tf.random.uniform does not make a RandomUniform operation"


def _seeds_of_layers() -> str:
    """BaseRandomLayer._random_generator: a trace that does not count."""
    layer = tf.keras.layers.Dropout(
        0.5, seed=3, name="probe", autocast=False, rng_type="legacy_stateful"
    )

    def step(x: tf.Tensor) -> list[tf.Tensor]:
        found = []
        for _ in range(2):
            with initial_values.kept_layer_seeds(layer):
                found.append(layer(x, training=True))
        return found

    _, nodes = _traced(step)
    seeds = [node.attr["seed2"].i for node in nodes if node.op == "RandomUniform"]
    if len(seeds) != 2 or seeds[0] != seeds[1]:
        return "BaseRandomLayer._random_generator does not keep the seed of a layer"
    return ""


def _deferred_variables() -> str:
    """A variable's class may change, and all reads go through one method."""
    read: list[str] = []

    class Watched(initial_values.ResourceVariable):
        def _read_variable_op(self, *args: Any, **kwargs: Any) -> Any:
            read.append("read")
            return super()._read_variable_op(*args, **kwargs)

        def sparse_read(self, *args: Any, **kwargs: Any) -> Any:
            read.append("gather")
            return super().sparse_read(*args, **kwargs)

    with tf.Graph().as_default():
        variable = initial_values.UninitializedVariable(
            shape=[2], dtype=tf.float32, trainable=True, name="smp_self_test"
        )
        variable.__class__ = Watched
        for use in (
            lambda: variable.read_value(),
            lambda: variable.value(),
            lambda: tf.convert_to_tensor(variable),
            lambda: variable + 1.0,
            lambda: tf.gather(variable, [0]),
        ):
            known = len(read)
            use()
            if len(read) == known:
                return "ResourceVariable._read_variable_op is not how a value is read"
        if initial_values.variable_of(variable.handle) is not variable:
            return "a variable's handle does not know its variable"
    if not isinstance(
        getattr(context.Context, "function_call_options", None), property
    ):
        return "Context.function_call_options is not there"
    return ""


def _scratch_graphs() -> str:
    """The graphs in which Keras finds out shapes are told by their names."""
    with keras_backend.get_graph().as_default():
        if not initial_values.is_read_later():
            return "the graph of Keras's functional models has another name"
    return ""


def _fitting() -> str:
    """What Keras checks, counts and keeps when it fits a model and saves it."""
    for hook in (
        applying,
        exporting,
        fitting,
        loss_scales,
        optimizer_slots,
        resuming,
        tracking,
    ):
        gone = hook.missing()
        if gone:
            return f"{gone} is not there"
    return ""


def _kernels() -> str:
    """What TensorFlow tells of its kernels."""
    if "CPU" not in kernels.devices_of("Identity"):
        return "kernels.get_registered_kernels_for_op knows none of Identity"
    return ""


_CHECKS = (
    _gradients,
    _custom_gradients,
    _functions_in_layers,
    _tapes,
    _repeated_calls,
    _seeds_of_initializers,
    _seeds_of_layers,
    _deferred_variables,
    _scratch_graphs,
    _fitting,
    _kernels,
)
