"""The methods of a ``DistributedModel`` that write the whole model, graphs and all."""

import os
from collections.abc import Sequence
from typing import Any

import tensorflow as tf

from smp_tf.errors import SmpError
from smp_tf.keras import saved_model
from smp_tf.keras.whole_weights import WholeWeights, showing_all


class WholeModel(WholeWeights):
    """The part of ``DistributedModel`` that writes models that need no smp_tf.

    Every rank of the job must call its methods, as those of ``WholeWeights``.
    """

    def save_model(
        self,
        save_path: Any = "/opt/ml/model",
        *,
        signatures: Any = None,
        input_signature: Sequence[Any] | None = None,
        options: Any = None,
    ) -> None:
        """Write the whole model as a SavedModel, with the weights that it has now.

            model.save_model("/opt/ml/model")

        ``tf.saved_model.load`` and ``tf.keras.models.load_model`` open it in a process
        without smp_tf; ``loaded(x, training=True)`` and ``training=False`` are there,
        and the signature ``serving_default`` for inference.

        Every rank of the job must call it; rank 0 traces the model and writes, and has
        at no time more than its own weights and 64 MiB, or one larger variable, in its
        memory. It is written as a whole: an error, or a full disk, leaves at
        ``save_path`` what was there. Other files in that folder stay.

        The state of the optimizer is in it only where there are no partitions; what
        ``compile`` was told is.

        Args:
            save_path: a folder, that may exist.
            signatures: as for ``tf.saved_model.save``, instead of ``serving_default``:
                functions that call the model, which they may inside.
            input_signature: what the model is called with: a list with a structure of
                TensorSpecs for each positional argument. If not said, what the first
                step has called it with. Either way for any batch size, as in Keras.
            options: a ``tf.saved_model.SaveOptions``.

        Raises:
            SmpError: on every rank: it cannot be written; or the model was never
                called, and there is no ``input_signature``.
            TypeError: ``input_signature`` is something else.
            TransportError: a rank failed, or did not come within timeout_s.
        """
        keywords = {"signatures": signatures, "options": options}
        self._save_graphs("save_model", save_path, True, input_signature, keywords)

    def save(
        self,
        filepath: Any,
        overwrite: bool = True,
        save_format: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the whole model as ``tf.keras.Model.save`` does.

        To ``.keras`` or ``.h5`` where its configuration tells how to make it again; to
        a folder as a SavedModel, see ``save_model``. Every rank of the job must call
        it.

        Raises:
            NotImplementedError: the model has no ``get_config``, which Keras needs for
                a file.
            SmpError: it exists and ``overwrite`` is False; or as for ``save_model``.
            Exception: what Keras raises on rank 0, on every rank.
            TransportError: a rank failed, or did not come within timeout_s.
        """
        form = _format_of_model(filepath, save_format)
        if form == "tf":
            self._save_graphs("save", filepath, overwrite, None, kwargs)
            return
        keras = super().save
        if form == "h5" and self._is_state_divided():
            kwargs["include_optimizer"] = False
        self._write(
            "save",
            filepath,
            overwrite,
            lambda: keras(filepath, overwrite, save_format, **kwargs),
        )

    def _save_graphs(
        self,
        name: str,
        filepath: Any,
        overwrite: bool,
        input_signature: Sequence[Any] | None,
        keywords: dict[str, Any],
    ) -> None:
        path, keras = os.fspath(filepath), super().save
        saved_model.require_plain(self, keywords.get("signatures"))
        arguments = None
        if input_signature is None:
            saved_model.require_known_arguments(self)
        else:
            arguments = saved_model.arguments_of(self, input_signature)
            if not self.built:
                saved_model.build(self, arguments)

        def write() -> None:
            _require_place(path, overwrite)
            with saved_model.called_with(self, arguments), showing_all():
                saved_model.write(
                    path,
                    self,
                    lambda folder: keras(folder, save_format="tf", **keywords),
                )

        self._write(name, path, True, write, is_known=True)


def _require_place(path: str, overwrite: bool) -> None:
    if not tf.io.gfile.exists(path):
        return
    if not overwrite:
        raise SmpError(
            f"there is something already: path={path!r} overwrite=False; remove it, or"
            " say overwrite=True"
        )
    if not tf.io.gfile.isdir(path):
        raise SmpError(
            f"a SavedModel is a folder, and there is a file: path={path!r}; remove it,"
            " or choose another path"
        )


def _format_of_model(filepath: Any, save_format: str | None) -> str:
    """As Keras finds it: "keras", "h5" or "tf"."""
    if save_format:
        return {"tensorflow": "tf", "hdf5": "h5"}.get(save_format, save_format)
    path = str(filepath)
    if path.endswith(".keras"):
        return "keras"
    return "h5" if path.endswith((".h5", ".hdf5")) else "tf"
