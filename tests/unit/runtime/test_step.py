"""``@smp.step`` in one process: arguments, results, ways of calling, errors.

Splitting over ranks is in ``tests/multiproc`` and ``tests/conformance``; here the truth
is what plain Keras or numpy gives for each microbatch.
"""

import collections
import inspect
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.unit.one_process import session

M = 2
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
Pair = collections.namedtuple("Pair", "first second")


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with session(microbatches=M):
        yield


class Linear(smp.DistributedModel):
    """x @ kernel, with kernel [3, 2]."""

    def __init__(self) -> None:
        super().__init__(name="linear")
        kernel = np.arange(6.0).reshape(3, 2)
        self.dense = tf.keras.layers.Dense(
            2, use_bias=False, kernel_initializer=tf.constant_initializer(kernel)
        )

    def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
        return self.dense(x)


KERNEL = np.arange(6, dtype="f").reshape(3, 2)


def rows(count: int, columns: int = 3) -> np.ndarray:
    return np.random.RandomState(0).randn(count, columns).astype("f")


def merged(output: Any) -> np.ndarray:
    return output.merge().numpy()


# --- arguments ------------------------------------------------------------------------


def test_tensors_in_every_container_are_split() -> None:
    model = Linear()
    seen = []

    @smp.step
    def step(x: Any, nested: Any, extra: Any) -> Any:
        seen.append(
            tf.nest.map_structure(
                lambda t: t.shape.as_list(), (x, nested, extra["array"])
            )
        )
        assert extra["set"] == {1, 2} and extra["text"] == "kept"
        return model(x), nested["pair"][0] + nested["pair"][1], extra["array"]

    x, a, b, array = rows(4), rows(4, 1), rows(4, 1), rows(6, 2)
    outputs = step(
        tf.constant(x),
        {"pair": (tf.constant(a), tf.constant(b))},
        extra={"array": array, "set": {1, 2}, "text": "kept"},
    )
    assert seen == [([2, 3], {"pair": ([2, 1], [2, 1])}, [3, 2])]
    assert isinstance(outputs, tuple) and len(outputs) == 3
    np.testing.assert_allclose(merged(outputs[0]), x @ KERNEL, **CLOSE)
    np.testing.assert_array_equal(merged(outputs[1]), a + b)
    np.testing.assert_array_equal(merged(outputs[2]), array)
    assert [each.shape for each in outputs[2].outputs] == [[3, 2]] * M


def test_non_split_inputs_and_axes() -> None:
    model = Linear()

    @smp.step(non_split_inputs=["table"], input_split_axes={"columns": 1})
    def step(x: Any, table: Any, columns: Any) -> Any:
        return model(x), table["all"] + 0.0, columns + 0.0

    x, table, columns = rows(4), rows(5), rows(3, 8)
    outputs = step(x, {"all": table}, columns)
    np.testing.assert_allclose(merged(outputs[0]), x @ KERNEL, **CLOSE)
    for mb in range(M):
        np.testing.assert_array_equal(outputs[1].outputs[mb], table)
    np.testing.assert_array_equal(outputs[2].concat(axis=1), columns)


class Sliced:
    """Splits itself, keeps what is no tensor."""

    def __init__(self, x: Any, scale: float) -> None:
        self.x, self.scale = x, scale

    def smp_slice(self, num_mb: int, mb: int, axis: int) -> Any:
        return Sliced(tf.split(self.x, num_mb, axis)[mb], self.scale)


class Uneven:
    """Its slices overlap: the library's own split could not make them."""

    def __init__(self, x: np.ndarray, form: Callable[[Any], Any]) -> None:
        self.x, self.form = x, form

    def smp_slice(self, num_mb: int, mb: int, axis: int) -> Any:
        return self.form(tf.constant(self.x[mb : mb + 3]))


@pytest.mark.parametrize(
    "form, get",
    [
        (lambda t: t, lambda part: part),
        (lambda t: {"x": t}, lambda part: part["x"]),
        (lambda t: Sliced(t, 1.0), lambda part: part.x),
    ],
    ids=["tensor", "dict", "object"],
)
def test_objects_split_themselves(form: Any, get: Any) -> None:
    model = Linear()
    step = smp.step(lambda part: model(get(part)))
    x = rows(4)
    outputs = step(Uneven(x, form)).outputs
    for mb in range(M):
        np.testing.assert_allclose(outputs[mb], x[mb : mb + 3] @ KERNEL, **CLOSE)


def test_sliced_objects_keep_their_other_attributes() -> None:
    model = Linear()
    step = smp.step(lambda batch: model(batch.x) * batch.scale)
    x = rows(4)
    for scale in (2.0, 3.0):
        result = merged(step(Sliced(tf.constant(x), scale)))
        np.testing.assert_allclose(result, x @ KERNEL * scale, **CLOSE)


def test_methods_defaults_and_keywords() -> None:
    class Trainer:
        def __init__(self, scale: float) -> None:
            self.model, self.scale = Linear(), scale

        @smp.step(non_split_inputs=["offset"])
        def step(self, x: Any, *, offset: Any = 0.0, **more: Any) -> Any:
            y = self.model(x) * self.scale + offset
            return {"y": y, **{key: value * 1.0 for key, value in more.items()}}

    one, other = Trainer(1.0), Trainer(2.0)
    x, extra = rows(4), rows(4, 1)
    np.testing.assert_allclose(merged(one.step(x)["y"]), x @ KERNEL, **CLOSE)
    result = other.step(x=x, offset=np.float32(5.0), extra=extra)
    np.testing.assert_allclose(merged(result["y"]), x @ KERNEL * 2 + 5, **CLOSE)
    np.testing.assert_array_equal(merged(result["extra"]), extra)
    assert "step" in Trainer.step.__name__


def test_variable_positional_arguments() -> None:
    model = Linear()

    @smp.step
    def step(first: Any, *rest: Any) -> Any:
        return [model(x) for x in (first, *rest)]

    a, b = rows(4), rows(2)
    results = step(a, b)
    np.testing.assert_allclose(merged(results[0]), a @ KERNEL, **CLOSE)
    np.testing.assert_allclose(merged(results[1]), b @ KERNEL, **CLOSE)


def test_a_step_keeps_its_name_docstring_and_signature() -> None:
    @smp.step
    def train(x: Any, y: Any = None) -> Any:
        """One pass."""

    assert (train.__name__, train.__doc__) == ("train", "One pass.")
    assert list(inspect.signature(train).parameters) == ["x", "y"]


# --- retracing ------------------------------------------------------------------------


def test_traced_once_per_shape_and_python_value() -> None:
    model = Linear()
    traced = []

    @smp.step
    def step(x: Any, factor: float) -> Any:
        traced.append((x.shape.as_list(), factor))
        return model(x) * factor

    for _ in range(3):
        for count, factor in ((4, 1.0), (6, 1.0), (4, 2.0)):
            x = rows(count)
            np.testing.assert_allclose(
                merged(step(x, factor)), x @ KERNEL * factor, **CLOSE
            )
    assert traced == [([2, 3], 1.0), ([3, 3], 1.0), ([2, 3], 2.0)]


def test_input_signature_with_unknown_batch_is_one_trace() -> None:
    model = Linear()
    traced = []

    @smp.step(input_signature=[tf.TensorSpec([None, 3], tf.float32)])
    def step(x: Any) -> Any:
        traced.append(x.shape.as_list())
        return model(x)

    for count in (4, 6, 2):
        x = rows(count)
        np.testing.assert_allclose(merged(step(x)), x @ KERNEL, **CLOSE)
    assert traced == [[None, 3]]

    @tf.function(input_signature=[tf.TensorSpec([None, 3], tf.float32)])
    def outer(x: Any) -> Any:
        return step(x).merge()

    np.testing.assert_allclose(outer(rows(8)), rows(8) @ KERNEL, **CLOSE)
    assert traced == [[None, 3]]
    with pytest.raises(tf.errors.InvalidArgumentError, match="microbatches=2"):
        outer(rows(3))
    with pytest.raises(TypeError, match="input_signature"):
        step(rows(4, 5))


def test_signature_of_a_method_and_of_defaults() -> None:
    class Trainer:
        def __init__(self) -> None:
            self.model, self.traced = Linear(), 0

        @smp.step(input_signature=[tf.TensorSpec([None, 3], tf.float32)])
        def step(self, x: Any, factor: float = 2.0) -> Any:
            self.traced += 1
            return self.model(x) * factor

    trainer = Trainer()
    for count in (2, 4):
        x = rows(count)
        np.testing.assert_allclose(merged(trainer.step(x)), x @ KERNEL * 2, **CLOSE)
    assert trainer.traced == 1


def test_autograph_may_be_left_out() -> None:
    model = Linear()

    @smp.step
    def converted(x: Any) -> Any:
        y = model(x)
        if tf.reduce_sum(x) > 0.0:
            y = -y
        return y

    x = np.concatenate([np.ones([2, 3]), -np.ones([2, 3])]).astype("f")
    want = np.concatenate([-x[:2] @ KERNEL, x[2:] @ KERNEL])
    np.testing.assert_allclose(merged(converted(x)), want, **CLOSE)

    @smp.step(autograph=False)
    def plain(x: Any) -> Any:
        if tf.reduce_sum(x) > 0.0:
            return model(x)
        return -model(x)

    with pytest.raises(TypeError, match="bool"):
        plain(x)


# --- results --------------------------------------------------------------------------


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


# --- ways of calling ------------------------------------------------------------------


def test_inside_functions_and_graph_loops() -> None:
    model, counter = Linear(), tf.Variable(0)
    traced = []

    @smp.step
    def step(x: Any) -> Any:
        traced.append(1)
        counter.assign_add(1)
        return tf.reduce_sum(model(x))

    @tf.function
    def outer(x: Any) -> Any:
        return step(x).reduce_sum() + step(x).reduce_sum()

    @tf.function
    def epoch(batches: Any) -> Any:
        total = 0.0
        for x in batches:
            total += step(x).reduce_sum()
        return total

    @tf.function
    def repeated(x: Any, times: Any) -> Any:
        total = 0.0
        for _ in tf.range(times):
            total += step(x).reduce_sum()
        return total

    x = rows(12)
    whole = (x @ KERNEL).sum()
    four = (x[:4] @ KERNEL).sum()
    np.testing.assert_allclose(step(x[:4]).reduce_sum(), four, rtol=1e-4)
    assert int(counter) == M
    np.testing.assert_allclose(outer(x[:4]), 2 * four, rtol=1e-4)
    assert int(counter) == 3 * M
    batches = tf.data.Dataset.from_tensor_slices(x).batch(4, drop_remainder=True)
    np.testing.assert_allclose(epoch(batches), whole, rtol=1e-4)
    assert int(counter) == 6 * M
    np.testing.assert_allclose(repeated(x[:4], 3), 3 * four, rtol=1e-4)
    assert int(counter) == 9 * M
    assert len(traced) == 1


def test_training_in_an_outer_function_that_is_traced_twice() -> None:
    """The optimizer makes its slots in the first trace; the step keeps its own."""
    model, optimizer = Linear(), tf.keras.optimizers.Adam(0.1)

    @smp.step
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables), loss

    @tf.function
    def train(x: Any) -> Any:
        gradients, loss = step(x)
        means = [gradient.accumulate() for gradient in gradients]
        optimizer.apply_gradients(zip(means, model.trainable_variables))
        return loss.reduce_mean()

    x = rows(4)
    losses = [float(train(x)) for _ in range(20)]

    kernel, reference = tf.Variable(KERNEL), tf.keras.optimizers.Adam(0.1)
    for loss in losses:
        with tf.GradientTape() as tape:
            want = tf.reduce_mean((x @ kernel) ** 2)
        np.testing.assert_allclose(loss, want, rtol=1e-4)
        reference.apply_gradients([(tape.gradient(want, kernel), kernel)])
    np.testing.assert_allclose(model.dense.kernel, kernel, rtol=1e-4)


def test_enclosing_tapes_do_not_disturb_and_are_not_disturbed() -> None:
    model, scale = Linear(), tf.Variable(2.0)

    @smp.step
    def step(x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(x))
        return tape.gradient(loss, model.trainable_variables)

    x = rows(4)
    with tf.GradientTape() as outside:
        before = scale * 3.0
        (gradient,) = step(x)
        after = before + scale
    assert gradient is not None
    np.testing.assert_allclose(gradient.outputs[0][:, 0], x[:2].sum(0), **CLOSE)
    assert float(outside.gradient(after, scale)) == 4.0


def test_training_and_evaluation_share_a_model() -> None:
    class Dropped(Linear):
        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            y = super().call(x)
            return y if not training else y * 0.0

    model = Dropped()
    train = smp.step(lambda x: model(x, training=True))
    evaluate = smp.step(lambda x: model(x, training=False))
    x = rows(4)
    assert not merged(train(x)).any()
    np.testing.assert_allclose(merged(evaluate(x)), x @ KERNEL, **CLOSE)
    assert not merged(train(x)).any()


def test_a_step_outlives_its_session() -> None:
    model = Linear()
    step = smp.step(lambda x: model(x))
    x = rows(6)
    assert len(step(x).outputs) == M
    for count in (3, 1):
        with session(microbatches=count):
            result = step(x)
            assert len(result.outputs) == count
            np.testing.assert_allclose(merged(result), x @ KERNEL, **CLOSE)


def test_random_operations_differ_between_microbatches_and_calls() -> None:
    model = Linear()

    @smp.step
    def step(x: Any) -> Any:
        return model(x), tf.random.uniform([8], seed=3)

    draws = [draw.numpy() for _ in range(2) for draw in step(rows(4))[1].outputs]
    assert len({draw.tobytes() for draw in draws}) == 2 * M


# --- errors ---------------------------------------------------------------------------


def test_decorator_errors() -> None:
    def step(x: Any, y: Any) -> Any:
        """Never called."""

    with pytest.raises(smp.ConfigError, match=r"non_split_inputs.*\['z'\].*'x', 'y'"):
        smp.step(step, non_split_inputs=["z"])
    with pytest.raises(smp.ConfigError, match=r"input_split_axes.*\['z'\]"):
        smp.step(step, input_split_axes={"z": 1})
    with pytest.raises(smp.ConfigError, match=r"\['retrace'\].*step=step"):
        smp.step(step, retrace=True)
    with pytest.raises(NotImplementedError, match="jit_compile"):
        smp.step(step, jit_compile=True)
    smp.step(step, reduce_retracing=True, jit_compile=False)


def test_call_errors() -> None:
    model = Linear()
    step = smp.step(lambda x: model(x))
    with pytest.raises(smp.MicrobatchError, match=r"'x' shape=\(3, 3\).*batches=2"):
        step(rows(3))
    with pytest.raises(TypeError, match="missing a required argument: 'x'"):
        step()
    with pytest.raises(TypeError, match="too many positional arguments"):
        step(rows(4), rows(4))
    smp.shutdown()
    with pytest.raises(smp.NotInitializedError, match="step"):
        step(rows(4))


def test_errors_keep_their_class_inside_a_function() -> None:
    model = Linear()
    step = smp.step(lambda x: model(x))
    with pytest.raises(smp.MicrobatchError):
        tf.function(lambda x: step(x).merge())(rows(3))


def test_errors_of_the_users_code_come_through_and_leave_nothing_behind() -> None:
    model, fail = Linear(), [True]

    @smp.step
    def step(x: Any) -> Any:
        if fail[0]:
            raise ValueError("of the user")
        return model(x)

    x = rows(4)
    with pytest.raises(ValueError, match="of the user"):
        step(x)
    fail[0] = False
    np.testing.assert_allclose(merged(step(x)), x @ KERNEL, **CLOSE)


def test_a_step_in_a_step_is_refused() -> None:
    model = Linear()
    inner = smp.step(lambda x: model(x))
    outer = smp.step(lambda x: inner(x).merge() + model(x))
    with pytest.raises(smp.TraceError, match="while another step is traced"):
        outer(rows(4))


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
