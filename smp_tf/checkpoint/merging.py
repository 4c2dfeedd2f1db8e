"""The parts of a checkpoint -> one plain checkpoint of TensorFlow."""

import pathlib
from typing import Any

import tensorflow as tf

from smp_tf.checkpoint import object_graph, saved
from smp_tf.checkpoint.bundle import bundle_writer, text_of
from smp_tf.errors import ConfigError, SmpError


def merge(directory: Any, output: Any, prefix: str | None = None) -> str:
    """Write the parts of a checkpoint as one that needs no smp_tf.

        merge("/opt/ml/checkpoints", "/models/whole")
        tf.train.Checkpoint(model=model, optimizer=optimizer).restore("/models/whole")
        model.load_weights("/models/whole")

    The names given to ``tf.train.Checkpoint`` are those of the job; a Keras optimizer
    gets its slots if it updates ``model.trainable_variables``. What ranks keep to
    themselves (random generators, iterators) is left out. In memory are 64 MiB at a
    time, or one larger variable.

    Args:
        directory: with the ``mp_rank_..`` folders of all parts.
        output: prefix of the new files: ``<output>.index``, ``<output>.data-..``.
        prefix: ``ckpt-3``; by default the latest.

    Returns:
        The name of the checkpoint that was merged.

    Raises:
        ConfigError: there is no such checkpoint, it is damaged, or there is something
            at ``output``. Nothing was written.
        SmpError: it cannot be written.
    """
    found, path = saved.find(directory, prefix), str(output)
    _require_place(path)
    entries = found.manifest.entries
    names = [name for name in entries if not object_graph.is_of_generator(name)]
    names.sort(key=lambda name: (entries[name].mp_rank, name))
    counter = object_graph.SAVE_COUNTER
    graph = object_graph.object_graph([*names, counter], found.manifest.trained)
    values = found.values()
    try:
        with bundle_writer(path) as writer:
            for name in names:
                writer.add(object_graph.key_of(name), values.read(name))
            writer.add(
                object_graph.key_of(counter),
                tf.constant(found.manifest.number, tf.int64),
            )
            writer.add(object_graph.KEY, tf.constant(graph.SerializeToString()))
    except (tf.errors.OpError, OSError) as error:
        raise SmpError(
            f"cannot write a checkpoint: file={path!r}: {text_of(error)}; look at the"
            " free space and the permissions there, or choose another place"
        ) from error
    return found.name


def _require_place(path: str) -> None:
    index = pathlib.Path(f"{path}.index")
    if pathlib.Path(path).is_dir():
        raise ConfigError(
            "what the files of a checkpoint begin with is not a folder:"
            f" output={path!r}; write {path.rstrip('/')}/whole"
        )
    if index.exists():
        raise ConfigError(
            f"there is a checkpoint already: output={path!r}; remove {str(index)!r}, or"
            " choose another place"
        )
