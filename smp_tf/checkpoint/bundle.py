"""Write a checkpoint of TensorFlow's format without having all of it in memory.

    add ──> a part of PART_BYTES ──> <prefix>_parts/part-3       one part in memory
    close: TensorFlow merges the parts' tables and renames their data   no values

A reader sees one checkpoint with several data files, as those that TensorFlow writes
from several devices.
"""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

import tensorflow as tf

PART_BYTES = 64 * 2**20
"""A part is written when it has so many, or one larger value."""

READ_ERRORS = (tf.errors.OpError, IndexError, RuntimeError, ValueError)
"""What ``tf.train.load_checkpoint`` and its ``get_tensor`` raise for damaged files."""


class BundleWriter:
    """See ``bundle_writer``."""

    def __init__(self, prefix: str, part_bytes: int) -> None:
        self._prefix, self._part_bytes = prefix, part_bytes
        self._parts: list[str] = []
        self._names: list[str] = []
        self._values: list[tf.Tensor] = []
        self._num_bytes = 0

    def add(self, name: str, value: Any) -> None:
        """Write a value; names are those of ``tf.train.load_checkpoint``.

        Args:
            value: a tensor, or what NumPy makes one of, with its dtype.
        """
        with tf.device("CPU:0"):
            tensor = tf.convert_to_tensor(value)
        self._names.append(name)
        self._values.append(tensor)
        self._num_bytes += tensor.dtype.size * int(tf.size(tensor))
        if self._num_bytes >= self._part_bytes:
            self._write_part()

    def _write_part(self) -> None:
        folder = f"{self._prefix}_parts"
        tf.io.gfile.makedirs(folder)
        part = f"{folder}/part-{len(self._parts)}"
        with tf.device("CPU:0"):
            tf.raw_ops.SaveV2(
                prefix=part,
                tensor_names=self._names,
                shape_and_slices=[""] * len(self._names),
                tensors=self._values,
            )
        self._parts.append(part)
        self._names, self._values, self._num_bytes = [], [], 0

    def close(self) -> None:
        if self._names:
            self._write_part()
        with tf.device("CPU:0"):
            tf.raw_ops.MergeV2Checkpoints(
                checkpoint_prefixes=self._parts,
                destination_prefix=self._prefix,
                delete_old_dirs=True,
            )

    def drop(self) -> None:
        """Remove what was written so far, as well as it goes."""
        with contextlib.suppress(tf.errors.OpError):
            tf.io.gfile.rmtree(f"{self._prefix}_parts")


@contextlib.contextmanager
def bundle_writer(prefix: str, part_bytes: int = PART_BYTES) -> Iterator[BundleWriter]:
    """Write the checkpoint ``prefix``; it is there when the block has ended, and not
    at all if it failed. At least one value must be added.

        with bundle_writer("/models/all/ckpt") as writer:
            writer.add("model/kernel", value)

    Raises:
        tf.errors.OpError: it cannot be written.
    """
    writer = BundleWriter(prefix, part_bytes)
    try:
        yield writer
        writer.close()
    except BaseException:
        writer.drop()
        raise


def text_of(error: Exception) -> str:
    """What TensorFlow says of a file, without the operation that said it."""
    message = getattr(error, "message", error)
    text = re.sub(r"\{\{.*?\}\}\s*|\s*\[Op:\w+\]", "", str(message))
    return f"{type(error).__name__}: {text}"
