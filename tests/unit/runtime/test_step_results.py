"""What a step returns: structures, gradients, and what accumulating them costs."""

import collections
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.unit.one_process import session
from tests.unit.runtime.linear import CLOSE, KERNEL, Linear, M, merged, rows

Pair = collections.namedtuple("Pair", "first second")


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with session(microbatches=M):
        yield


def test_structure_is_kept() -> None:
    model = Linear()
    variable = tf.Variable(3.0)

    @smp.step
    def step(x: Any) -> Any:
        y = model(x)
        return {
            "z": Pair(y, [y * 2.0, (None, "text", 7)]),
            "a": collections.OrderedDict(q=y, p=None),
            "variable": variable,
            "empty": [],
            "default": collections.defaultdict(list, y=y),
            "user": collections.UserDict(y=y),
        }

    x = rows(4)
    result = step(x)
    assert list(result) == ["z", "a", "variable", "empty", "default", "user"]
    assert type(result["default"]) is collections.defaultdict
    assert type(result["user"]) is collections.UserDict
    for name in ("default", "user"):
        np.testing.assert_allclose(merged(result[name]["y"]), rows(4) @ KERNEL, **CLOSE)
    assert type(result["z"]) is Pair
    assert type(result["a"]) is collections.OrderedDict
    assert list(result["a"]) == ["q", "p"] and result["a"]["p"] is None
    assert result["z"].second[1] == (None, "text", 7)
    assert result["empty"] == []
    np.testing.assert_allclose(merged(result["z"].second[0]), x @ KERNEL * 2, **CLOSE)
    assert isinstance(result["variable"], smp.StepOutput)
    np.testing.assert_array_equal(result["variable"].outputs, [3.0, 3.0])


def test_arguments_constants_and_variables_may_be_returned_as_they_are() -> None:
    model = Linear()

    @smp.step
    def step(x: Any) -> Any:
        return model(x), x, tf.constant([1.0, 2.0]), model.dense.kernel, tf.shape(x)

    x = rows(4)
    _, same, constant, kernel, shape = step(x)
    np.testing.assert_array_equal(merged(same), x)
    np.testing.assert_array_equal(constant.stack(), [[1, 2], [1, 2]])
    np.testing.assert_array_equal(kernel.outputs[1], KERNEL)
    np.testing.assert_array_equal(shape.stack(), [[2, 3], [2, 3]])


def gradient_styles() -> dict[str, Callable[[Any, Any], Any]]:
    """Every documented way to take gradients: (model, x) -> gradient of the kernel."""

    def loss_of(model: Any, x: Any) -> Any:
        return tf.reduce_mean(model(x) ** 2)

    def tape(model: Any, x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = loss_of(model, x)
        return tape.gradient(loss, model.trainable_variables)[0]

    def persistent(model: Any, x: Any) -> Any:
        with tf.GradientTape(persistent=True) as tape:
            y = model(x)
            one, other = tf.reduce_mean(y**2) * 0.25, tf.reduce_mean(y**2) * 0.75
        kernel = model.trainable_variables[0]
        return tape.gradient(one, kernel) + tape.gradient(other, kernel)

    def graph(model: Any, x: Any) -> Any:
        loss = loss_of(model, x)
        return tf.gradients(loss, model.trainable_variables)[0]

    def legacy(model: Any, x: Any) -> Any:
        optimizer = tf.keras.optimizers.legacy.SGD()
        loss = loss_of(model, x)
        return optimizer.get_gradients(loss, model.trainable_variables)[0]

    def compute_gradients(model: Any, x: Any) -> Any:
        optimizer = tf.keras.optimizers.SGD()
        with tf.GradientTape() as tape:
            loss = loss_of(model, x)
        pairs = optimizer.compute_gradients(loss, model.trainable_variables, tape)
        return pairs[0][0]

    return {
        function.__name__: function
        for function in (tape, persistent, graph, legacy, compute_gradients)
    }


@pytest.mark.parametrize("style", gradient_styles())
def test_gradients(style: str) -> None:
    function = gradient_styles()[style]
    model = Linear()
    step = smp.step(lambda x: function(model, x))
    x = rows(4)
    gradient = step(x)
    want = [part.T @ (part @ KERNEL) * 2 / 4 for part in np.split(x, M)]
    for mb in range(M):
        np.testing.assert_allclose(gradient.outputs[mb], want[mb], **CLOSE)
    np.testing.assert_allclose(gradient.accumulate(), np.mean(want, 0), **CLOSE)


def test_nested_tapes() -> None:
    """A gradient penalty: the inner gradient is part of the forward pass."""
    model = Linear()

    @smp.step
    def step(x: Any) -> Any:
        with tf.GradientTape() as outer:
            with tf.GradientTape() as inner:
                inner.watch(x)
                y = tf.reduce_sum(model(x) ** 3)
            penalty = tf.reduce_sum(inner.gradient(y, x) ** 2)
        return outer.gradient(penalty, model.trainable_variables), penalty

    x = rows(4)
    (gradient,), penalty = step(x)
    for mb, part in enumerate(np.split(x, M)):
        kernel = tf.Variable(KERNEL)
        with tf.GradientTape() as tape:
            slope = 3 * (part @ kernel) ** 2 @ tf.transpose(kernel)
            want = tf.reduce_sum(slope**2)
        np.testing.assert_allclose(penalty.outputs[mb], want, rtol=1e-4)
        np.testing.assert_allclose(
            gradient.outputs[mb], tape.gradient(want, kernel), rtol=1e-4
        )


class Looked(smp.DistributedModel):
    """An embedding, whose gradient is sparse, and a layer that gets no gradient."""

    def __init__(self) -> None:
        super().__init__(name="looked")
        self.embed = tf.keras.layers.Embedding(5, 2)
        self.unused = tf.keras.layers.Dense(3)

    def call(self, tokens: tf.Tensor) -> tf.Tensor:
        x = self.embed(tokens)
        return x, self.unused(x)


def test_sparse_and_missing_gradients() -> None:
    model = Looked()

    @smp.step
    def step(tokens: Any) -> Any:
        with tf.GradientTape() as tape:
            x, _ = model(tokens)
            loss = tf.reduce_sum(x)
        gradients = tape.gradient(loss, model.trainable_variables)
        return gradients, dict(zip("ekb", gradients))

    tokens = np.array([[0, 1], [1, 1], [4, 4], [2, 0]], "i")
    gradients, by_name = step(tokens)
    assert len(gradients) == len(model.trainable_variables) == 3
    assert gradients[1:] == [None, None] and by_name["k"] is None
    for gradient in (gradients[0], by_name["e"]):
        assert isinstance(gradient.outputs[0], tf.IndexedSlices)
        mean = tf.convert_to_tensor(gradient.accumulate())
        counts = np.bincount(tokens.ravel(), minlength=5)[:, np.newaxis]
        np.testing.assert_allclose(mean, np.repeat(counts / M, 2, 1), **CLOSE)


# --- memory ---------------------------------------------------------------------------


_PEAK = """
import resource, sys
import smp_tf as smp
import tensorflow as tf

M = int(sys.argv[1])
smp.init({"partitions": 1, "microbatches": M})

class Wide(smp.DistributedModel):
    def __init__(self):
        super().__init__()
        self.parts = [tf.keras.layers.Dense(1000) for _ in range(4)]

    def call(self, x):
        for part in self.parts:
            x = part(x)
        return x

model = Wide()

@smp.step
def step(x):
    with tf.GradientTape() as tape:
        loss = tf.reduce_mean(model(x) ** 2)
    return tape.gradient(loss, model.trainable_variables)

@tf.function
def train(x):
    gradients = [gradient.accumulate() for gradient in step(x)]
    for gradient, variable in zip(gradients, model.trainable_variables):
        variable.assign_sub(0.01 * gradient)

for _ in range(3):
    train(tf.ones([2 * M, 1000]))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)
"""


@pytest.mark.slow
def test_accumulate_does_not_hold_all_gradients() -> None:
    """All gradients of a microbatch are 16 MB: 30 more of them would be 480 MB."""
    peak_mb = []
    for count in (2, 32):
        run = subprocess.run(
            [sys.executable, "-c", _PEAK, str(count)],
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
        assert run.returncode == 0, run.stderr[-3000:]
        peak_mb.append(int(run.stdout.split()[-1]))
    assert peak_mb[1] - peak_mb[0] < 120, f"peak MB for M=2, 32: {peak_mb}"


def test_gradients_leave_the_step_while_the_rest_of_it_runs(monkeypatch: Any) -> None:
    """So that replicas can average them meanwhile. The timeline shows it, too, but
    depends on the machine; here a gradient must not wait for the last call."""
    monkeypatch.setattr(sys.modules["smp_tf.runtime.step"], "PIECE_BYTES", 1)

    class Net(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__()
            self.all = [tf.keras.layers.Dense(4, use_bias=False) for _ in range(3)]

        def call(self, x: tf.Tensor) -> tf.Tensor:
            for layer in self.all:
                x = layer(x)
            return x

    model = Net()

    @smp.step
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x))
        return tape.gradient(loss, model.trainable_variables)

    @tf.function
    def train(x: tf.Tensor) -> Any:
        return [gradient.accumulate() for gradient in step(x)]

    x = tf.constant(rows(4, 4))
    train(x)
    (built,) = step._built.values()
    graph = built.function.graph
    last = {op.name for op in graph.get_operations() if op.type == "SmpRunEnd"}
    assert last <= _behind(graph.control_outputs)
    sums = built.results._emitted.summed.values()
    waits = [_behind([graph.outputs[i].op]) for i in sums]
    assert not any(last & names for names in waits)
    calls = [sum("SmpCall" in name for name in names) for names in waits]
    assert len(set(calls)) == 3, calls  # each gradient after another number of calls


def _behind(ops: Any) -> set[str]:
    """Names of the operations that some wait for, and of themselves."""
    seen: dict[str, Any] = {}
    waiting = list(ops)
    while waiting:
        op = waiting.pop()
        if op.name not in seen:
            seen[op.name] = op
            waiting += [tensor.op for tensor in op.inputs]
            waiting += op.control_inputs
    return set(seen)
