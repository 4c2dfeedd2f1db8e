"""Eager operations do not read a variable past its class."""

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.frontend import variables


def deferred() -> tf.Variable:
    with smp.delay_param_initialization():
        return tf.Variable(lambda: tf.ones([2, 3]))


def test_a_value_that_waits_is_there_for_an_operation() -> None:
    assert tf.squeeze(deferred()).shape == [2, 3]
    assert float(tf.reduce_sum(deferred())) == 6.0


@pytest.mark.parametrize("was_read", [False, True])
def test_an_operation_cannot_take_a_value_of_another_partition(was_read: bool) -> None:
    variable = deferred()
    if was_read:
        variable.numpy()
    variables.place([variable], {id(variable.handle): 1}, 0)
    for operation in (tf.squeeze, tf.reduce_sum, tf.identity):
        with pytest.raises(smp.SmpError, match="partition=1"):
            operation(variable)
