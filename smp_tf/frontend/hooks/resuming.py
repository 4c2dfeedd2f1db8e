"""Where ``Model.fit`` begins, for a training that goes on after an interruption."""

from typing import Any

from tf_keras.src.engine import training


class _Start:
    """What ``fit`` asks for its first epoch and batch."""

    def __init__(self, epoch: int, batch: int) -> None:
        self._epoch, self._batch = epoch, batch

    def maybe_load_initial_counters_from_ckpt(
        self, steps_per_epoch: Any, initial_epoch: Any, mode: Any
    ) -> tuple[int, int]:
        return self._epoch, self._batch


def start_at(model: Any, epoch: int, batch: int) -> None:
    """In ``on_train_begin``: ``fit`` begins with this batch of this epoch. It counts
    from there; the data starts at its beginning all the same."""
    model._training_state = _Start(epoch, batch)


def forget_start(model: Any) -> None:
    """``fit`` begins where its arguments say."""
    model._training_state = None


def missing() -> str:
    """The first place that is gone; "" if all are there."""
    method = "_maybe_load_initial_counters_from_ckpt"
    found = getattr(training.Model, method, None)
    if found is None:
        return f"tf_keras Model.{method}"
    for name in ("_training_state", method[1:]):
        if name not in found.__code__.co_names:
            return f"{name} in tf_keras Model.{method}"
    return ""
