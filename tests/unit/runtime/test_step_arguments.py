"""How the arguments of a step are split over microbatches."""

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.unit.one_process import session
from tests.unit.runtime.linear import CLOSE, KERNEL, Linear, M, merged, rows


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with session(microbatches=M):
        yield


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
