"""What a loss scale that moves keeps for itself."""

from typing import Any

from tf_keras.src.mixed_precision import loss_scale_optimizer

from smp_tf.frontend.hooks import refusal


def move(optimizer: Any, gradients: Any) -> None:
    """Let the scale of a dynamic LossScaleOptimizer grow or shrink as it would when it
    applies ``gradients``: for a rank that has nothing to apply."""
    state = getattr(optimizer, "_loss_scale", None)
    if not callable(getattr(state, "update", None)):
        raise refusal("tf_keras LossScaleOptimizer._loss_scale.update")
    assert state is not None
    state.update(gradients)


def missing() -> str:
    """The first place that is gone; "" if all are there."""
    state = getattr(loss_scale_optimizer, "_DynamicLossScaleState", None)
    if callable(getattr(state, "update", None)):
        return ""
    return "tf_keras loss_scale_optimizer._DynamicLossScaleState.update"
