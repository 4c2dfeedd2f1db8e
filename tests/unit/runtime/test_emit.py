"""Parts of the emitter that need no pipeline: how gradients are added together."""

import pytest
import tensorflow as tf

from smp_tf.runtime import emit


@pytest.mark.parametrize(
    "sizes, groups",
    [
        ([], []),
        ([3, 3, 3], [(0, 1, 2)]),
        ([9, 1], [(0, 1)]),
        ([9, 2], [(0,), (1,)]),
        ([4, 25, 4, 4], [(0,), (1,), (2, 3)]),  # the second alone is over the limit
        ([0, 10, 0], [(0, 1, 2)]),
    ],
)
def test_groups_stay_under_the_limit(sizes: list[int], groups: list) -> None:
    assert emit.group_by_bytes(enumerate(sizes), 10) == groups


def test_add_all_adds_by_position() -> None:
    tensors = [tf.constant(value) for value in (1.0, 2.0, 10.0, 20.0)]
    assert [total.numpy() for total in emit._add_all(*tensors)] == [11.0, 22.0]
