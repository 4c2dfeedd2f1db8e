"""What Hugging Face's ``TF*`` models need to be trained by ``fit`` in a pipeline.

Their own ``train_step`` runs the whole batch in one process. What it does besides is
kept, in places where a pipeline has them:

==================  ==================================================================
once for a batch    labels go into the inputs, where the model's ``call`` looks for
                    them to compute its own loss
each microbatch     ``compute_loss`` takes that loss, or the one given to ``compile``;
                    ``compute_metrics`` finds the outputs that the labels are for
==================  ==================================================================

``save_pretrained`` writes the whole model, from rank 0.
"""

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

from smp_tf.errors import SmpError
from smp_tf.keras.training import Training

_MODULE = "transformers.modeling_tf_utils"
_MORE_LABELS = ("start_positions", "end_positions")  # of answers to questions


def trains_as_there(model_class: type) -> bool:
    """Whether a class has Hugging Face's own ``train_step``."""
    return getattr(model_class, "train_step").__module__ == _MODULE


class HuggingFace:
    """Comes before the model's own class; ``DistributedModel`` comes after that."""

    def train_step(self: Any, data: Any) -> Any:
        """See ``Training.train_step``."""
        return Training.train_step(self, self._smp_with_labels(data))

    def test_step(self: Any, data: Any) -> Any:
        """See ``Training.test_step``."""
        return Training.test_step(self, self._smp_with_labels(data))

    def compute_loss(
        self: Any,
        x: Any = None,
        y: Any = None,
        y_pred: Any = None,
        sample_weight: Any = None,
    ) -> Any:
        """The model's own loss if ``compile`` was given none, else that one."""
        if not _uses_own_loss(self):
            y, y_pred = _matched(y, y_pred)
            return super().compute_loss(x, y, y_pred, sample_weight)  # type: ignore
        loss = y_pred.get("loss")
        if loss is None:
            raise SmpError(
                "the model computes its own loss from labels, and got none:"
                f" model={self.name!r} inputs={sorted(x) if isinstance(x, dict) else 1}"
                f" labels={_label_names(self)}; give one of these, or compile the model"
                " with a loss"
            )
        return super().compute_loss(x, loss, loss, sample_weight)  # type: ignore

    def compute_metrics(
        self: Any, x: Any, y: Any, y_pred: Any, sample_weight: Any
    ) -> dict[str, Any]:
        """Update the metrics with the outputs that the labels are for."""
        y, y_pred = _matched(y, y_pred)
        super().compute_metrics(x, y, y_pred, sample_weight)  # type: ignore[misc]
        return {}

    def save_pretrained(
        self: Any, save_directory: Any, *args: Any, **kwargs: Any
    ) -> None:
        """Write the whole model as the plain one would: ``from_pretrained`` reads it,
        with and without smp_tf. Every rank of the job must call it; rank 0 writes.

        Raises:
            SmpError: ``saved_model`` is true, and the model is partitioned.
            TransportError: a rank failed, or did not come within timeout_s.
        """
        if kwargs.get("saved_model") and self.placement is not None:
            raise SmpError(
                "a partitioned model is not written as a SavedModel:"
                f" model={self.name!r} saved_model=True; leave it out, and load the"
                " folder into the plain model"
            )

        def write() -> None:
            with _as_plain(self):
                self.save_pretrained(save_directory, *args, **kwargs)

        self._write("save_pretrained", save_directory, True, write)

    def _smp_with_labels(self: Any, data: Any) -> tuple[Any, Any, Any]:
        """(x, y, sample_weight) of a batch, with labels in both of the former."""
        x, y, sample_weight = tf.keras.utils.unpack_x_y_sample_weight(data)
        names, parameters = _label_names(self), _parameters(self)
        output_of_label = self.get_label_to_output_name_mapping()
        label_of_output = {output: label for label, output in output_of_label.items()}
        if y is None:
            y = {key: x[key] for key in names if key in x}
            if not y and not _uses_own_loss(self):
                raise ValueError(
                    f"no labels in the inputs: model={self.name!r} labels={names};"
                    " give one of these, or targets beside the inputs"
                )
        elif _uses_own_loss(self):
            given = y if isinstance(y, dict) else {}
            if len(names) == 1 and tf.is_tensor(y):
                given = {names[0]: y}
            found = {
                name: value
                for key, value in given.items()
                for name in (key, label_of_output.get(key))
                if name in parameters
            }
            x = {**found, **(x if isinstance(x, dict) else {parameters[0]: x})}
        if isinstance(y, dict):
            y = {output_of_label.get(key, key): value for key, value in y.items()}
        return x, y, sample_weight


@contextlib.contextmanager
def _as_plain(model: Any) -> Iterator[None]:
    distributed = type(model)
    object.__setattr__(model, "__class__", distributed._smp_plain)
    try:
        yield
    finally:
        object.__setattr__(model, "__class__", distributed)


def _uses_own_loss(model: Any) -> bool:
    return getattr(model.loss, "__name__", "") == "dummy_loss"


def _parameters(model: Any) -> list[str]:
    return list(inspect.signature(model.call).parameters)


def _label_names(model: Any) -> list[str]:
    return [
        name for name in _parameters(model) if "label" in name or name in _MORE_LABELS
    ]


def _matched(y: Any, y_pred: Any) -> tuple[Any, Any]:
    """Labels, and the outputs that they are for."""
    names = [name for name in y_pred if name != "loss"]
    if isinstance(y, dict) and len(y) == 1:
        ((name, y),) = y.items()
        return y, y_pred[name if name in names else names[0]]
    if isinstance(y, dict):
        return y, {name: y_pred[name] for name in names if name in y}
    if isinstance(y, tuple | list):
        return y, tuple(y_pred[name] for name in names[: len(y)])
    return y, y_pred[names[0]]
