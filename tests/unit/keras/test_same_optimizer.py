"""What the ranks compare of their optimizers: plain data, the same text everywhere."""

from typing import Any

import tensorflow as tf

from smp_tf.keras import same_optimizer

K = tf.keras


class Bare(K.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """Without get_config, as users write them."""

    def __call__(self, step: Any) -> Any:
        return 0.1 / (1.0 + tf.cast(step, tf.float32))


def test_options_are_what_an_optimizer_was_made_with() -> None:
    options = same_optimizer._options(K.optimizers.SGD(0.5, clipnorm=1.0))
    assert options["learning_rate"] == 0.5 and options["clipnorm"] == 1.0
    schedule = K.optimizers.schedules.ExponentialDecay(0.1, 10, 0.5)
    options = same_optimizer._options(K.optimizers.Adam(schedule))
    assert options["learning_rate"]["config"]["decay_rate"] == 0.5


def test_an_optimizer_that_does_not_tell_is_known_by_its_name() -> None:
    optimizer = K.optimizers.SGD(Bare(), global_clipnorm=2.0)
    assert same_optimizer._options(optimizer) == {"global_clipnorm": 2.0}
    scaled = K.mixed_precision.LossScaleOptimizer(K.optimizers.SGD(0.1))
    assert same_optimizer._name(scaled) == "LossScaleOptimizerV3(SGD)"


def test_only_what_differs_is_told() -> None:
    kinds = [("SGD", {"a": 1, "b": 2}), ("SGD", {"a": 1, "b": 3}), ("Adam", {"a": 1})]
    assert same_optimizer._differences((0, 1, 3), kinds) == (
        "rank 0: SGD(b=2); rank 1: SGD(b=3); rank 3: Adam()"
    )
