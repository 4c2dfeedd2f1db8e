"""``smp.load_full_weights``: from a checkpoint in parts into a plain Keras model."""

from collections.abc import Iterable, Mapping
from typing import Any

import tensorflow as tf

from smp_tf.checkpoint import saved
from smp_tf.checkpoint.manifest import Entry
from smp_tf.checkpoint.names import names_of
from smp_tf.checkpoint.object_graph import is_of_generator
from smp_tf.errors import ConfigError

_SHOWN = 5


def load_full_weights(model: Any, directory: Any, prefix: str | None = None) -> str:
    """Load the weights of the whole model from a ``smp.CheckpointManager``'s directory.

        model = Net()
        model.build([None, 28, 28])
        smp.load_full_weights(model, "/opt/ml/checkpoints")

    For one process and any Keras model with the same attributes: neither ``smp.init``
    nor the job's layout matter. One variable at a time is in memory besides the model.

    Args:
        model: built, that is with all its variables; of the class that was trained,
            where it may be written on ``tf.keras.Model``.
        directory: with the ``mp_rank_..`` folders of all partitions.
        prefix: ``ckpt-3``; by default the latest.

    Returns:
        The name of the checkpoint, ``ckpt-3``.

    Raises:
        ConfigError: there is no such checkpoint, it is damaged, or its variables are
            not those of the model. In the last case no variable was set.
    """
    _require_built(model)
    found = saved.find(directory, prefix)
    variables = _own_names(model)
    root = _root_of(variables, found.manifest.entries)
    _require_alike(model, variables, root, found)
    values = found.values()
    for name, variable in variables.items():
        variable.assign(values.read(f"{root}/{name}"))
    return found.name


def _own_names(model: Any) -> dict[str, Any]:
    """Name inside the model -> variable; of its weights, not of its optimizer."""
    weights = {id(each.handle) for each in model.weights if hasattr(each, "handle")}
    beginning = "model/"
    return {
        name.removeprefix(beginning): variable
        for name, variable in names_of(tf.train.Checkpoint(model=model)).items()
        if id(variable.handle) in weights and not is_of_generator(name)
    }


def _root_of(names: Iterable[str], entries: Mapping[str, Entry]) -> str:
    """The path from the checkpoint to its model: that which fits most names."""
    counts = {"model": 0}
    for name in names:
        for found in entries:
            if found.endswith(f"/{name}"):
                root = found.removesuffix(f"/{name}")
                counts[root] = counts.get(root, 0) + 1
    return max(counts, key=lambda root: counts[root])


def _require_built(model: Any) -> None:
    if not isinstance(model, tf.keras.Model):
        raise ConfigError(
            "weights are loaded into a model of Keras 2 (tf_keras), which is tf.keras"
            f" after `import smp_tf`: model={model!r}"
        )
    if not model.built:
        raise ConfigError(
            "a model has its variables once it is built, and there are none to load"
            f" into: model={model.name!r}; call it, or model.build(input_shape)"
        )


def _require_alike(
    model: Any, variables: Mapping[str, Any], root: str, found: saved.Saved
) -> None:
    entries, wrong = found.manifest.entries, []
    for name, variable in variables.items():
        entry, path = entries.get(f"{root}/{name}"), f"variable={root}/{name}"
        shape, dtype = tuple(variable.shape), variable.dtype.name
        if entry is None:
            wrong.append(f"{path} is not in the checkpoint")
        elif (entry.shape, entry.dtype) != (shape, dtype):
            wrong.append(
                f"{path} is {shape} {dtype}, in the checkpoint {entry.shape}"
                f" {entry.dtype}"
            )
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" * (len(wrong) > _SHOWN)
        raise ConfigError(
            f"a checkpoint of another model: model={model.name!r} {found.where()}:"
            f" {'; '.join(wrong[:_SHOWN])}{more}; `python -m smp_tf checkpoint inspect"
            f" {found.directory}` lists what it has"
        )
