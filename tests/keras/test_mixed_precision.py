"""What crosses between ranks is in the compute dtype; variables stay float32."""

from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from tests.keras.scripts import crossentropy, dense_net


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_activations_travel_in_the_compute_dtype(dtype: str) -> None:
    tf.keras.mixed_precision.set_global_policy(f"mixed_{dtype}")
    try:
        model = dense_net(smp.DistributedModel)

        @smp.step
        def step(x: Any, y: Any) -> Any:
            with tf.GradientTape() as tape:
                loss = crossentropy()(y, model(x, training=True))
            return tape.gradient(loss, model.trainable_variables), loss

        x, y = tf.zeros([8, 6]), tf.zeros([8], tf.int64)
        plan = smp.plan(step, (x, y), partitions=2, microbatches=4).plan
    finally:
        tf.keras.mixed_precision.set_global_policy("float32")
    crossing = [cut.spec for cut in plan.segments.cuts]
    large = {spec.dtype for spec in crossing if spec.num_elements > 1}
    assert large == {dtype}
    assert {variable.dtype for variable in model.global_variables} == {tf.float32}
