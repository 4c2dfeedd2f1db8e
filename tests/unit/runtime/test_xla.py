"""When XLA is wanted, and what the log says of a segment that runs without it."""

from collections.abc import Iterator

import pytest
import tensorflow as tf

from smp_tf.config import resolve
from smp_tf.runtime import xla

UNSUPPORTED = (
    "Failed getting HLO text: 'Detected unsupported operations when trying to compile"
    " graph __inference_<lambda>_665[a=1,b=2] on XLA_CPU_JIT: PyFunc (No registered"
    " 'PyFunc' OpKernel for XLA_CPU_JIT devices compatible with node {{node PyFunc}})"
    "{{node PyFunc}}\nThe op is created at: \n"
)


@pytest.fixture
def jit() -> Iterator[None]:
    tf.config.optimizer.set_jit(True)
    try:
        yield
    finally:
        tf.config.optimizer.set_jit(False)


def test_wanted_by_the_configuration() -> None:
    assert xla.is_wanted(resolve({"xla": True}, 1))
    assert not xla.is_wanted(resolve(None, 1))


def test_wanted_by_tensorflow(jit: None) -> None:
    assert xla.is_wanted(resolve(None, 1))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (
            ValueError(UNSUPPORTED),
            "PyFunc (No registered 'PyFunc' OpKernel for XLA_CPU_JIT devices compatible"
            " with node {{node PyFunc}})",
        ),
        (ValueError("\n  \nsecond line\nthird"), "second line"),
        (ValueError(), "ValueError"),
        (ValueError("x" * 1000), "x" * 300 + "..."),
    ],
)
def test_reason(error: Exception, reason: str) -> None:
    assert xla.reason_of(error) == reason
