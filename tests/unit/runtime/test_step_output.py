"""StepOutput against numpy, dense and sparse."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from smp_tf.runtime.step_output import StepOutput

M = 4
VALUES = np.random.RandomState(0).randn(M, 3, 5).astype("f")
ROWS = np.random.RandomState(1).randn(M, 2, 5).astype("f")
INDICES = [[0, 2], [2, 1], [2, 2], [0, 1]]  # rows that meet, also in one microbatch


def dense() -> StepOutput:
    return StepOutput([tf.constant(value) for value in VALUES])


def sparse() -> StepOutput:
    shape = tf.constant([3, 5])
    slices = zip(map(tf.constant, ROWS), map(tf.constant, INDICES))
    return StepOutput([tf.IndexedSlices(row, index, shape) for row, index in slices])


def scattered() -> np.ndarray:
    """What the slices mean, made dense by numpy: [M, 3, 5]."""
    result = np.zeros((M, 3, 5), "f")
    for mb in range(M):
        np.add.at(result[mb], INDICES[mb], ROWS[mb])
    return result


CASES = {"dense": (dense, VALUES), "sparse": (sparse, scattered())}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("in_function", [False, True])
@pytest.mark.parametrize(
    "method, expected",
    {
        "reduce_mean": lambda values: values.mean(0),
        "reduce_sum": lambda values: values.sum(0),
        "accumulate": lambda values: values.mean(0),
        "concat": np.concatenate,
        "merge": np.concatenate,
        "stack": np.stack,
    }.items(),
)
def test_methods_equal_numpy(
    case: str, method: str, expected: Any, in_function: bool
) -> None:
    make, values = CASES[case]

    def call() -> tf.Tensor:
        return tf.convert_to_tensor(getattr(make(), method)())

    result = tf.function(call)() if in_function else call()
    np.testing.assert_allclose(result, expected(values), rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["variable", "add_n", "accumulate_n"])
def test_every_way_to_accumulate_is_the_mean(case: str, method: str) -> None:
    make, values = CASES[case]
    result = tf.convert_to_tensor(make().accumulate(method=method))
    np.testing.assert_allclose(result, values.mean(0), rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_accumulate_assigns_the_variable(case: str) -> None:
    make, values = CASES[case]
    variable = tf.Variable(tf.zeros([3, 5]))
    make().accumulate(var=variable)
    np.testing.assert_allclose(variable, values.mean(0), rtol=1e-6)


def test_accumulate_refuses_unknown_methods() -> None:
    with pytest.raises(ValueError, match="method='sum'.*|accumulate_n"):
        dense().accumulate(method="sum")


def test_sparse_gradients_stay_sparse_where_they_can() -> None:
    for method in ("reduce_mean", "reduce_sum", "accumulate"):
        result = getattr(sparse(), method)()
        assert isinstance(result, tf.IndexedSlices)
        assert result.values.shape == [M * 2, 5]
        assert result.indices.shape == [M * 2]


def test_axes() -> None:
    np.testing.assert_array_equal(dense().concat(axis=1), np.concatenate(VALUES, 1))
    np.testing.assert_array_equal(dense().concat(axis=-1), np.concatenate(VALUES, -1))
    np.testing.assert_array_equal(dense().stack(axis=1), np.stack(VALUES, 1))


def test_scalars_are_stacked_by_merge() -> None:
    output = StepOutput([tf.constant(float(i)) for i in range(M)])
    np.testing.assert_array_equal(output.merge(), [0, 1, 2, 3])
    assert float(output.reduce_mean()) == 1.5


@pytest.mark.parametrize("dtype", [tf.int32, tf.int64, tf.float16, tf.float64])
def test_dtype_is_kept(dtype: tf.DType) -> None:
    output = StepOutput([tf.cast([2, 4], dtype), tf.cast([4, 8], dtype)])
    for method in ("reduce_mean", "reduce_sum", "accumulate", "merge", "stack"):
        assert getattr(output, method)().dtype == dtype, method
    np.testing.assert_array_equal(output.reduce_mean(), [3, 6])


def test_ready_sum_is_used_instead_of_the_microbatches() -> None:
    """The step has already added up: the same values, whatever the outputs are."""
    output = StepOutput([tf.zeros([2]), tf.zeros([2])], tf.constant([4.0, 6.0]))
    np.testing.assert_array_equal(output.reduce_sum(), [4, 6])
    np.testing.assert_array_equal(output.reduce_mean(), [2, 3])
    np.testing.assert_array_equal(output.accumulate(), [2, 3])
    np.testing.assert_array_equal(output.concat(), np.zeros(4))


def test_outputs_and_repr() -> None:
    output = dense()
    assert isinstance(output.outputs, list) and len(output.outputs) == M
    for mb in range(M):
        np.testing.assert_array_equal(output.outputs[mb], VALUES[mb])
    assert "4 microbatches" in repr(output)
