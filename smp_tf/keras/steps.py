"""What ``fit``, ``evaluate`` and ``predict`` do with one batch, as functions decorated
with ``smp.step``.

A step runs forward, loss, backward and the updates of the metrics for each microbatch.
What follows is once for a batch: the gradients of all of them, see ``updates``.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.errors import ConfigError
from smp_tf.frontend.hooks import fitting
from smp_tf.keras.batches import Piece, num_rows, pieces_of, require_rows
from smp_tf.runtime import session
from smp_tf.runtime.step import Step, step


class BatchSteps:
    """The three steps of a model, for batches of any size."""

    def __init__(self, model: Any) -> None:
        self._steps: dict[tuple[str, int], Step] = {}
        self._functions = functions_of(model)

    def run(self, name: str, data: Sequence[Any]) -> list[tuple[Piece, Any]]:
        """Each piece of a batch with what the step returns for it.

        Args:
            name: "train_step", "test_step" or "predict_step".
            data: arguments of the step: structures of tensors of one batch, or None.

        Raises:
            ConfigError: a tensor is not one row for each example.
        """
        require_rows(name, data)
        count = session.config().microbatches
        rows = num_rows(data)
        if not rows:  # the step finds out, or says what is wrong
            pieces: tuple[Piece, ...] = (Piece(0, 0, count, 1.0),)
            return [(pieces[0], self._step(name, count)(*data, None))]
        found = []
        for piece in pieces_of(rows, count):
            part = data if piece.rows == rows else [piece.of(each) for each in data]
            factor = rows * piece.microbatches / piece.rows
            found.append(
                (piece, self._step(name, piece.microbatches)(*part, factor))
            )
        return found

    def _step(self, name: str, microbatches: int) -> Step:
        key = name, microbatches
        if key not in self._steps:
            made = step(self._functions[name])
            self._steps[key] = made.with_microbatches(microbatches)
        return self._steps[key]


def functions_of(model: Any) -> dict[str, Callable[..., Any]]:
    """What runs for each microbatch, by name."""
    return {
        "train_step": _train(model),
        "test_step": _test(model),
        "predict_step": _predict(model),
    }


def _train(model: Any) -> Callable[..., Any]:
    def train_step(x: Any, y: Any, sample_weight: Any, factor: float | None) -> Any:
        """Gradients of all trained variables, and logs of ``compute_metrics``."""
        with tf.GradientTape() as tape:
            y_pred = model(x, training=True)
            loss = _loss(model, x, y, y_pred, sample_weight, factor)
            fitting.require_target_and_loss(model, y, loss)
            scale = getattr(model.optimizer, "get_scaled_loss", None)
            scaled = loss if scale is None else scale(loss)
        gradients = tape.gradient(scaled, model.trainable_variables)
        return gradients, _logs(model, x, y, y_pred, sample_weight)

    return train_step


def _test(model: Any) -> Callable[..., Any]:
    def test_step(x: Any, y: Any, sample_weight: Any, factor: float | None) -> Any:
        """The loss, which nobody reads, and logs of ``compute_metrics``."""
        y_pred = model(x, training=False)
        loss = _loss(model, x, y, y_pred, sample_weight, factor)
        logs = _logs(model, x, y, y_pred, sample_weight)
        return y_pred if loss is None and not logs else loss, logs

    return test_step


def _predict(model: Any) -> Callable[..., Any]:
    def predict_step(x: Any, factor: float | None) -> Any:
        return model(x, training=False)

    return predict_step


def _logs(model: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any) -> Any:
    """Update the metrics; the logs if the user computes them, for which Keras has
    ``Model.compute_metrics``, else nothing: they are read once, after the batch."""
    logs = model.compute_metrics(x, y, y_pred, sample_weight)
    is_users = type(model).compute_metrics is not tf.keras.Model.compute_metrics
    return logs if is_users else {}


def _loss(
    model: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any, factor: float | None
) -> Any:
    """The loss of a microbatch, such that the mean over microbatches is that of the
    batch. A loss that is a sum over examples has to count for more, then.

    Args:
        factor: by how much: examples of the batch / of the microbatch.
    """
    if _is_sum(model):
        if factor is None:
            raise ConfigError(
                "a loss with reduction SUM needs batches of a known size:"
                f" model={model.name!r}; give the dataset static batch shapes"
            )
        sample_weight = _scaled(model, sample_weight, y_pred, factor)
    return model.compute_loss(x, y, y_pred, sample_weight)


def _is_sum(model: Any) -> bool:
    """Whether the compiled losses add the examples up.

    Raises:
        ConfigError: some do and some do not; or one has no reduction at all, of which
            Keras takes the gradient of the sum.
    """
    loss = model.loss
    every = [each for each in tf.nest.flatten(loss) if each is not None]
    reductions = [getattr(each, "reduction", None) for each in every]
    is_keras = type(model).compute_loss is tf.keras.Model.compute_loss
    if is_keras and "none" in reductions:
        raise ConfigError(
            "a loss must be one number, the sum or the mean over the examples:"
            f" reduction='none' loss={loss!r}; give it reduction='sum' or"
            " 'sum_over_batch_size'"
        )
    sums = [reduction == "sum" for reduction in reductions]
    if any(sums) and not all(sums):
        raise ConfigError(
            "the losses of a model must all be sums over the examples, or all be"
            f" means: loss={loss!r}; give them the same reduction"
        )
    return any(sums)


def _scaled(model: Any, sample_weight: Any, y_pred: Any, factor: float) -> Any:
    """Sample weights that count ``factor`` times; those of all outputs, for an output
    without weights counts as one whose weights are 1."""
    rows = tf.shape(tf.nest.flatten(y_pred)[0])[:1]

    def scaled(weight: Any) -> tf.Tensor:
        if weight is None:
            return tf.fill(rows, tf.cast(factor, tf.float32))
        return weight * tf.cast(factor, weight.dtype)

    if not isinstance(sample_weight, Mapping):
        return tf.nest.map_structure(scaled, sample_weight)
    if isinstance(y_pred, Mapping):
        return {name: scaled(sample_weight.get(name)) for name in y_pred}
    outputs = len(tf.nest.flatten(y_pred))
    if len(sample_weight) != outputs:
        raise ConfigError(
            "with a loss that has reduction SUM, sample weights by name are for all"
            f" outputs: model={model.name!r} weights={sorted(sample_weight)}"
            f" outputs={outputs}; give the others weights of 1"
        )
    return {name: scaled(weight) for name, weight in sample_weight.items()}
