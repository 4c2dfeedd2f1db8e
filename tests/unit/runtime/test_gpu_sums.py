"""The functions that add up on GPUs, as graphs: traced here, run on none."""

from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.data_parallel import averaging
from smp_tf.data_parallel.buckets import Bucket, Part
from smp_tf.runtime import gpu_sums, session

GROUP = 7


@pytest.fixture(autouse=True)
def rank_with_gpu() -> Iterator[None]:
    """A process by itself, whose groups say that they add up by NCCL."""
    smp.init({})
    links = session.current("test").gpu_links
    with mock.patch.object(links, "group_for_sums", lambda group: GROUP):
        yield
    smp.shutdown()


class Halves:
    """A compression, as Horovod has it."""

    @staticmethod
    def compress(tensor: tf.Tensor) -> tuple[tf.Tensor, tf.DType]:
        return tf.cast(tensor, tf.float16), tensor.dtype

    @staticmethod
    def decompress(tensor: tf.Tensor, context: tf.DType) -> tf.Tensor:
        return tf.cast(tensor, context)


def mean_of(shapes: list[tuple[int, ...]], name: str = "bucket") -> Any:
    parts = tuple(Part(shape, "float32", 4) for shape in shapes)
    bucket = Bucket(tuple(range(len(parts))), parts)
    return averaging.mean_of(bucket, Halves, name)


def the(graph: Any, kind: str) -> tf.Operation:
    (found,) = [op for op in graph.get_operations() if op.type == kind]
    return found


def turn_of(function: Any) -> tf.Tensor:
    """The handle of the variable that a function writes."""
    written = the(function.graph, "AssignAddVariableOp").inputs[0]
    (found,) = [given for given, inner in function.graph.captures if inner is written]
    return found


def is_before(one: tf.Operation, other: tf.Operation) -> bool:
    """Whether an operation cannot begin before another one is over."""
    before = [*other.control_inputs, *(tensor.op for tensor in other.inputs)]
    return one in before or any(is_before(one, each) for each in before)


def total(value: tf.Tensor, name: str = "sum") -> Any:
    """The function that ``gpu_sums.total`` calls for a tensor; it is not called."""
    calls: list[Any] = []

    def note(*arguments: Any, **more: Any) -> Any:
        calls.append(in_turns(*arguments, **more))
        return lambda value: [value]

    in_turns = gpu_sums.in_turns
    with mock.patch.object(gpu_sums, "in_turns", note):
        gpu_sums.total(value, smp.DP_GROUP, GROUP, name)
    return calls[0] if calls else None


def test_gradients_travel_as_one_vector_and_come_back_as_means() -> None:
    function = mean_of([(2, 3), (4,)])
    post, wait = (the(function.graph, f"SmpSum{what}") for what in ("Post", "Wait"))
    assert (post.get_attr("group"), post.get_attr("label")) == (GROUP, b"bucket")
    assert (post.inputs[0].shape, post.inputs[0].dtype) == ([10], tf.float16)
    assert list(wait.inputs) == list(post.outputs)
    assert post.device.endswith("GPU:0") and wait.device.endswith("GPU:0")
    specs = [(tensor.shape, tensor.dtype) for tensor in function.outputs]
    assert specs == [([2, 3], tf.float32), ([4], tf.float32)]


def test_a_sum_begins_in_its_turn_and_is_not_waited_for() -> None:
    """The next sum may begin as soon as this one has; who reads it waits for it."""
    for function in (mean_of([(2, 3)]), total(tf.zeros([5]))):
        graph = function.graph
        begin, post = the(graph, "AssignAddVariableOp"), the(graph, "SmpSumPost")
        assert is_before(begin, post)
        assert set(graph.control_outputs) == {begin, post}
        assert begin.device.endswith("CPU:0")


def test_all_sums_take_turns_with_each_other() -> None:
    """NCCL matches them by order, whatever they are."""
    functions = [mean_of([(2, 3)]), mean_of([(4,)], "other"), total(tf.zeros([5]))]
    assert all(turn_of(each) is gpu_sums.turn().handle for each in functions)


def test_there_is_one_function_for_each_type_and_shape() -> None:
    assert total(tf.zeros([5])) is not None
    assert total(tf.ones([5])) is None
    assert total(tf.zeros([6])) is not None


def test_only_what_nccl_adds_up_and_a_gpu_keeps() -> None:
    assert gpu_sums.group_for(smp.DP_GROUP, tf.bfloat16) == GROUP
    for dtype in (tf.int32, tf.complex64, tf.bool):
        assert gpu_sums.group_for(smp.DP_GROUP, dtype) is None
