"""Tensors of one type as one vector and back; types that Horovod does not know."""

from collections.abc import Sequence

import tensorflow as tf

_AS_OTHERS = {
    # The type that can be added up -> what it travels as.
    tf.bfloat16: tf.float32,
    tf.complex64: tf.float32,
    tf.complex128: tf.float64,
}


def joined(tensors: Sequence[tf.Tensor]) -> tf.Tensor:
    """One after the other as a vector; a single one as it is."""
    if len(tensors) == 1:
        return tensors[0]
    return tf.concat([tf.reshape(tensor, [-1]) for tensor in tensors], 0)


def divided(vector: tf.Tensor, shapes: Sequence[tf.TensorShape]) -> list[tf.Tensor]:
    """The tensors that were ``joined``."""
    if len(shapes) == 1:
        return [vector]
    pieces = tf.split(vector, [shape.num_elements() for shape in shapes])
    return [tf.reshape(piece, shape) for piece, shape in zip(pieces, shapes)]


def as_known(tensor: tf.Tensor) -> tf.Tensor:
    """The tensor in a type that Horovod adds up as it should be."""
    other = _AS_OTHERS.get(tensor.dtype)
    if other is None:
        return tensor
    if tensor.dtype.is_complex:
        return tf.bitcast(tensor, other)  # the real and the imaginary part
    return tf.cast(tensor, other)


def as_before(tensor: tf.Tensor, dtype: tf.DType) -> tf.Tensor:
    """The inverse of ``as_known``."""
    if dtype.is_complex:
        return tf.bitcast(tensor, dtype)
    return tf.cast(tensor, dtype)
