"""Parts of the emitter that need no pipeline: adding gradients, choosing the call."""

from typing import Any

import pytest
import tensorflow as tf

from smp_tf.errors import TransportError
from smp_tf.runtime import emit
from smp_tf.transport import ops


def test_add_all_adds_by_position() -> None:
    tensors = [tf.constant(value) for value in (1.0, 2.0, 10.0, 20.0)]
    assert [total.numpy() for total in emit._add_all(*tensors)] == [11.0, 22.0]


def test_segments_are_called_by_our_operation_where_it_is() -> None:
    assert emit._call_type(emit._ops_if_built(is_alone=True)) == "SmpCall"


def test_a_single_process_needs_no_library_and_several_do(monkeypatch: Any) -> None:
    def load() -> None:
        raise TransportError("the kernels are not built")

    monkeypatch.setattr(ops, "load", load)
    assert emit._call_type(emit._ops_if_built(is_alone=True)) == ""
    with pytest.raises(TransportError, match="not built"):
        emit._ops_if_built(is_alone=False)


def test_with_a_gpu_segments_are_called_by_tensorflow(monkeypatch: Any) -> None:
    monkeypatch.setattr(tf.config, "get_visible_devices", lambda kind: [kind])
    assert emit._call_type(ops) == ""
