"""The private TensorFlow hooks: the self-test, what they record, that they go away."""

import contextlib
import pathlib
import subprocess
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import tensorflow as tf
from tensorflow.python import pywrap_tfe
from tensorflow.python.eager import backprop, context, execute, record
from tensorflow.python.ops import gradients_util, random_ops

import smp_tf as smp
from smp_tf.frontend import hooks
from smp_tf.frontend.hooks import (
    graphs,
    initial_values,
    kernels,
    recording,
    self_test,
)

PLACES = [
    (execute, "record_gradient"),
    (record, "record_operation"),
    (record, "record_operation_backprop_only"),
    (gradients_util, "_maybe_colocate_with"),
    (gradients_util, "_GradientsHelper"),
    (tf.GradientTape, "gradient"),
    (tf.keras.layers.Layer, "__call__"),
]


def current() -> list[Any]:
    return [getattr(owner, name) for owner, name in PLACES]


def traced(function: Callable[..., Any], *shapes: list[int]) -> tuple[Any, Any]:
    """(recorder, nodes by name) of a function traced with all hooks in place."""
    recorder = recording.Recorder()

    def body(*tensors: tf.Tensor) -> Any:
        recorder.graph = tf.compat.v1.get_default_graph()
        return function(*tensors)

    specs = [tf.TensorSpec(shape, tf.float32) for shape in shapes]
    with graphs.outside_of_graphs(), recording.tracing(recorder):
        graph = graphs.trace_function("test", body, specs)
    return recorder, {node.name: node for node in graph.as_graph_def().node}


def forward_ops(nodes: dict[str, Any], op: str) -> list[str]:
    """Kinds of operation that the gradient operations of this kind belong to."""
    found = []
    for node in nodes.values():
        forward = recording.read_attribute(node, recording.FORWARD)
        if node.op == op and forward:
            found.append(nodes[forward].op)
    return found


def test_the_self_test_passes_and_leaves_nothing(monkeypatch: Any) -> None:
    before = current()
    monkeypatch.setattr(self_test, "_is_passed", False)
    self_test.run()
    assert self_test._is_passed
    assert current() == before


@pytest.mark.parametrize(
    "broken, complaint",
    [
        ("__call__", "Layer.__call__ does not mark"),
        ("gradient", "GradientTape.gradient or tf.gradients does not report"),
        ("_GradientsHelper", "GradientTape.gradient or tf.gradients does not report"),
        ("_maybe_colocate_with", "do not know their forward"),
        ("record_gradient", "do not know their forward"),
        ("record_operation", "record_operation does not mark a custom gradient"),
    ],
)
def test_init_notices_a_wrapped_place_that_nothing_goes_through(
    monkeypatch: Any, broken: str, complaint: str
) -> None:
    """As a future TensorFlow that takes another way."""
    places = [
        (owner, name, (lambda original: original) if broken == name else wrapper)
        for owner, name, wrapper in recording._PLACES
    ]
    monkeypatch.setattr(recording, "_PLACES", places)
    expect_refusal(monkeypatch, complaint)


def expect_refusal(monkeypatch: Any, complaint: str) -> None:
    monkeypatch.setattr(self_test, "_is_passed", False)
    try:
        with pytest.raises(smp.TraceError) as caught:
            smp.init()
    finally:
        smp.shutdown()
    assert complaint in str(caught.value)
    assert f"tensorflow={tf.__version__}" in str(caught.value)
    assert f"known to work: {hooks.KNOWN_VERSIONS}" in str(caught.value)
    assert not self_test._is_passed
    assert not smp.is_initialized()


def test_init_names_a_place_that_is_gone(monkeypatch: Any) -> None:
    missing = (tf.GradientTape, "no_such_method", lambda original: original)
    monkeypatch.setattr(recording, "_PLACES", (*recording._PLACES, missing))
    before = current()
    expect_refusal(monkeypatch, "no_such_method")
    assert current() == before


def run_python(program: str) -> str:
    """What a process of its own prints."""
    return subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True, text=True, timeout=120, check=True,
        cwd=pathlib.Path(__file__).resolve().parents[3],
    ).stdout  # fmt: skip


def test_a_module_that_is_gone_is_named() -> None:
    program = """
import sys
import smp_tf as smp, tensorflow as tf
from tensorflow.python import ops
del ops.gradients_util
sys.modules["tensorflow.python.ops.gradients_util"] = None
for use in (smp.init, lambda: smp.DistributedModel):
    try:
        use()
    except smp.TraceError as error:
        print(error)
"""
    lines = run_python(program).splitlines()
    assert len(lines) == 2
    for line in lines:
        assert "tensorflow.python.ops.gradients_util" in line
        assert f"known to work: {hooks.KNOWN_VERSIONS}" in line


_create_op_internal = tf.Graph._create_op_internal


def create_with_inputs_swapped(
    graph: Any, op_type: str, inputs: list[Any], *args: Any, **kwargs: Any
) -> Any:
    """Of those operations that repeat a call."""
    if "_disable_call_shape_inference" in (kwargs.get("attrs") or {}):
        inputs = inputs[::-1]
    return _create_op_internal(graph, op_type, inputs, *args, **kwargs)


@pytest.mark.parametrize(
    "owner, name, replacement, complaint",
    [
        (record, "stop_recording", contextlib.nullcontext, "keep a call out of a tape"),
        (
            pywrap_tfe,
            "TFE_Py_TapeSetIsStopped",
            lambda: False,
            "gradient operations",
        ),
        (
            tf.Graph,
            "_create_op_internal",
            create_with_inputs_swapped,
            "does not repeat an operation",
        ),
        (recording, "_LIBRARIES", ("smp_tf",), "does not write out a tf.function"),
        (
            random_ops,
            "random_seed",
            types.SimpleNamespace(get_seed=lambda seed: (1, 2)),
            "random_seed.get_seed",
        ),
        (
            initial_values,
            "kept_layer_seeds",
            contextlib.nullcontext,
            "does not keep the seed of a layer",
        ),
        (
            initial_values.ResourceVariable,
            "value",
            lambda variable: tf.zeros([2]),
            "not how a value is read",
        ),
        (initial_values, "variable_of", lambda handle: None, "does not know"),
        (initial_values, "_SCRATCH_GRAPHS", ("renamed",), "has another name"),
        (context.Context, "function_call_options", None, "function_call_options"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_init_notices_a_hook_that_changed(
    monkeypatch: Any, owner: Any, name: str, replacement: Any, complaint: str
) -> None:
    monkeypatch.setattr(owner, name, replacement)
    expect_refusal(monkeypatch, complaint)


def test_the_self_test_leaves_seeds_and_runtime_alone() -> None:
    """A script chooses seeds, devices and threads after smp.init, or before."""
    program = """
import tensorflow as tf, smp_tf as smp
from tensorflow.python.eager import context
tf.keras.utils.set_random_seed(7)
%s
assert not context.context()._initialized
tf.config.threading.set_intra_op_parallelism_threads(1)
print(tf.random.uniform([2]).numpy(), tf.keras.initializers.HeNormal()([2]).numpy())
"""
    printed = [run_python(program % line) for line in ("", "smp.init()")]
    assert printed[0] == printed[1] != ""


@pytest.mark.parametrize("error", [None, KeyError("inside")])
def test_tensorflow_is_restored_after_tracing(error: Exception | None) -> None:
    before = current()
    try:
        with recording.tracing(recording.Recorder()):
            assert recording.is_tracing()
            assert all(now is not then for now, then in zip(current(), before))
            if error is not None:
                raise error
    except KeyError as caught:
        assert caught is error
    assert not recording.is_tracing()
    assert current() == before
    x = tf.Variable(3.0)
    with tf.GradientTape() as tape:
        y = x * x
    assert float(tape.gradient(y, x)) == 6.0
    assert backprop._gradient_function.__module__ == backprop.__name__


def test_tracing_does_not_nest() -> None:
    with recording.tracing(recording.Recorder()):
        with pytest.raises(smp.TraceError, match="while another step is traced"):
            with recording.tracing(recording.Recorder()):
                pytest.fail("entered")
        assert recording.is_tracing()
    assert not recording.is_tracing()


@pytest.mark.parametrize("style", ["tape", "persistent", "graph"])
def test_gradient_operations_know_their_forward(style: str) -> None:
    def function(x: tf.Tensor, w: tf.Tensor) -> Any:
        if style == "graph":
            y = tf.reduce_sum(tf.tanh(tf.matmul(x, w)))
            return tf.gradients(y, [x, w])
        with tf.GradientTape(persistent=style == "persistent") as tape:
            tape.watch([x, w])
            y = tf.reduce_sum(tf.tanh(tf.matmul(x, w)))
        return tape.gradient(y, [x, w])

    recorder, nodes = traced(function, [2, 3], [3, 4])
    assert forward_ops(nodes, "TanhGrad") == ["Tanh"]
    assert forward_ops(nodes, "MatMul") == ["MatMul", "MatMul"]
    marked = [node for node in nodes.values() if recording.GRADIENT in node.attr]
    assert {"TanhGrad", "MatMul"} <= {node.op for node in marked}
    assert not any(node.op == "Tanh" for node in marked)
    assert [tensor.op.type for tensor in recorder.losses] == ["Sum"]
    ((sources, results),) = recorder.gradients
    assert [s.shape for s in sources] == [r.shape for r in results]


def test_calls_and_custom_gradients_know_their_forward() -> None:
    @tf.custom_gradient
    def clipped(x: tf.Tensor) -> Any:
        return tf.sinh(x), lambda dy: tf.clip_by_value(dy, -1.0, 1.0)

    @tf.function
    def called(x: tf.Tensor) -> Any:
        return tf.cosh(x)

    def function(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = tf.reduce_sum(called(clipped(x)))
        return tape.gradient(y, x)

    _, nodes = traced(function, [3])
    # TensorFlow wraps the results of a custom gradient in an IdentityN.
    assert forward_ops(nodes, "Minimum") == ["IdentityN"]
    calls = [n for n in nodes.values() if "PartitionedCall" in n.op]
    backward = [n for n in calls if recording.GRADIENT in n.attr]
    assert len(calls) == 2 and len(backward) == 1
    assert recording.read_attribute(backward[0], recording.FORWARD) in nodes
    assert forward_ops(nodes, backward[0].op) == [backward[0].op]


class Inner(tf.keras.layers.Layer):
    def call(self, x: tf.Tensor) -> tf.Tensor:
        return tf.sin(x)


class Outer(tf.keras.layers.Layer):
    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.inner = Inner(name="inner")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return tf.cos(self.inner(x)) + tf.tan(x)


def test_layers_are_marked_with_their_path() -> None:
    model, outside = Outer(name="model"), Inner(name="outside")
    setattr(model, recording.DISTRIBUTED_MARK, True)

    def function(x: tf.Tensor) -> Any:
        return tf.exp(outside(model(x)))

    recorder, nodes = traced(function, [3])
    layer = {n.op: recording.read_attribute(n, recording.LAYER) for n in nodes.values()}
    assert layer["Cos"] == layer["Tan"] == "model"
    assert layer["Exp"] == ""
    sines = [n for n in nodes.values() if n.op == "Sin"]
    assert sorted(recording.read_attribute(n, recording.LAYER) for n in sines) == [
        "",  # a layer outside every DistributedModel
        "model/inner",
    ]
    assert recorder.models == [model]
    assert recorder.layer_path == ()


def test_a_failing_layer_leaves_the_path() -> None:
    class Failing(tf.keras.layers.Layer):
        def call(self, x: tf.Tensor) -> tf.Tensor:
            raise ValueError("broken")

    model, failing = Outer(name="model"), Failing(name="failing")
    for each in (model, failing):
        setattr(each, recording.DISTRIBUTED_MARK, True)

    def function(x: tf.Tensor) -> Any:
        with pytest.raises(ValueError, match="broken"):
            failing(x)
        return model(x)

    _, nodes = traced(function, [3])
    sine = next(n for n in nodes.values() if n.op == "Sin")
    assert recording.read_attribute(sine, recording.LAYER) == "model/inner"


def test_tapes_work_after_leaving_the_graphs() -> None:
    """tf.init_scope alone stops every tape, and gradients become None in silence."""
    variable = tf.Variable(2.0)
    found = []

    @tf.function
    def function() -> tf.Tensor:
        with tf.GradientTape() as outer:
            with graphs.outside_of_graphs():
                assert tf.executing_eagerly()
                with tf.GradientTape() as tape:
                    y = variable**3
                found.append(tape.gradient(y, variable))
            z = variable**2
        return outer.gradient(z, variable)

    assert float(function()) == 4.0
    assert float(found[0]) == 12.0


def test_attributes_are_read_back_and_end_with_their_block() -> None:
    with tf.Graph().as_default() as graph:
        with recording.attributes(**{recording.LAYER: "a/b", recording.PARTITION: 3}):
            inside = tf.constant(1).op
        outside = tf.constant(2).op
    assert recording.read_attribute(inside.node_def, recording.LAYER) == "a/b"
    assert inside.node_def.attr[recording.PARTITION].i == 3
    assert recording.read_attribute(outside.node_def, recording.LAYER) == ""
    assert graph is not None


def test_without_tapes_keeps_a_call_out_of_the_tape() -> None:
    x = tf.Variable(3.0)
    with tf.GradientTape() as tape:
        y = x * 2.0
        with graphs.without_tapes():
            z = x * 5.0
        total = y + z
    assert float(tape.gradient(total, x)) == 2.0


@pytest.mark.parametrize("has_variant", [False, True])
def test_repeated_calls_compute_and_have_the_shapes_of_the_first(
    has_variant: bool,
) -> None:
    variable = tf.Variable([1.0, 2.0])

    @tf.function(experimental_attributes={"_noinline": True})
    def body(x: tf.Tensor) -> list[Any]:
        scalars = tf.constant([], tf.int32)
        items = tf.raw_ops.TensorListFromTensor(tensor=x, element_shape=scalars)
        return [x * variable, tf.reduce_sum(x)] + [items] * has_variant

    called = body.get_concrete_function(tf.TensorSpec([2]))

    @tf.function(autograph=False)
    def outer(x: tf.Tensor) -> list[tf.Tensor]:
        calls = graphs.Calls(called)
        results = [calls(x * factor) for factor in (1.0, 2.0, 3.0)]
        for result in results:
            assert [t.shape for t in result[:2]] == [[2], []]
            assert len({t.op for t in result}) == 1
        assert len({result[0].op for result in results}) == 3
        return [t for result in results for t in result[:2]]

    found = [t.numpy().tolist() for t in outer(tf.constant([3.0, 5.0]))]
    assert found == [[3, 10], 8, [6, 20], 16, [9, 30], 24]


def test_kernels_tell_their_devices() -> None:
    assert "CPU" in kernels.devices_of("MatMul")
    assert kernels.devices_of("NoSuchOperation") == ()
