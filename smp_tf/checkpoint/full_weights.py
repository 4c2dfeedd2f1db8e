"""``smp.load_full_weights``: from a checkpoint in parts into a plain Keras model."""

from collections.abc import Mapping
from typing import Any

import tensorflow as tf

from smp_tf.checkpoint import saved
from smp_tf.checkpoint.manifest import Entry
from smp_tf.checkpoint.names import names_of
from smp_tf.checkpoint.object_graph import is_of_generator, is_slot
from smp_tf.checkpoint.verifying import require_undamaged
from smp_tf.errors import ConfigError

_SHOWN = 5


def load_full_weights(
    model: Any, directory: Any, prefix: str | None = None, root: str | None = None
) -> str:
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
        root: the model's name in the job's ``tf.train.Checkpoint``, for a checkpoint of
            several models; by default "model", or the only one that fits.

    Returns:
        The name of the checkpoint, ``ckpt-3``.

    Raises:
        ConfigError: there is no such checkpoint, it is damaged, its variables are not
            those of the model, or are so under several names. No variable was set.
    """
    _require_built(model)
    found = saved.find(directory, prefix)
    variables = _own_names(model)
    if root is None:
        root = _root_of(variables, found)
    _require_alike(model, variables, root, found)
    parts = {found.manifest.entries[f"{root}/{name}"].mp_rank for name in variables}
    require_undamaged(found, parts)
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


def _root_of(variables: Mapping[str, Any], found: saved.Saved) -> str:
    """The path from the checkpoint to its model: that which fits most variables. What
    an optimizer keeps for a variable looks the same, and is none of it."""
    entries = found.manifest.entries
    fits: dict[str, list[bool]] = {}
    for name, variable in variables.items():
        for path, entry in entries.items():
            if path.endswith(f"/{name}") and not is_slot(path, entries):
                root = path.removesuffix(f"/{name}")
                fits.setdefault(root, []).append(_is_alike(variable, entry))
    counts = {root: (len(each), sum(each)) for root, each in fits.items()}
    most = max(counts.values(), default=None)
    best = [root for root, count in counts.items() if count == most]
    if "model" in best or not best:
        return "model"
    if len(best) > 1:
        raise ConfigError(
            f"several models of a checkpoint fit: {found.where()} roots={sorted(best)};"
            " choose one: load_full_weights(model, directory, root=..)"
        )
    return best[0]


def _is_alike(variable: Any, entry: Entry) -> bool:
    return (entry.shape, entry.dtype) == (tuple(variable.shape), variable.dtype.name)


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
        if entry is None:
            wrong.append(f"{path} is not in the checkpoint")
        elif not _is_alike(variable, entry):
            wrong.append(
                f"{path} is {tuple(variable.shape)} {variable.dtype.name}, in the"
                f" checkpoint {entry.shape} {entry.dtype}"
            )
    if wrong:
        more = f"; and {len(wrong) - _SHOWN} more" * (len(wrong) > _SHOWN)
        raise ConfigError(
            f"a checkpoint of another model: model={model.name!r} {found.where()}:"
            f" {'; '.join(wrong[:_SHOWN])}{more}; `python -m smp_tf checkpoint inspect"
            f" {found.directory}` lists what it has"
        )
