"""``StepOutput``: one returned value of a step, as it came out of each microbatch."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

_Value = Any  # tf.Tensor or tf.IndexedSlices


class StepOutput:
    """A value returned by an ``smp.step``: M microbatches, and ways to merge them.

    ``tf.IndexedSlices`` (gradients of embeddings) stay sparse where the result can be
    sparse: in ``reduce_mean``, ``reduce_sum`` and ``accumulate``; the other methods
    make them dense.

    Attributes:
        outputs: the M values, in order of microbatches.
    """

    def __init__(
        self, outputs: Sequence[_Value], total: tf.Tensor | None = None
    ) -> None:
        """
        Args:
            total: their sum where the step has already added them up while it ran
                (gradients), so that not all of them have to exist at the same time.
        """
        self.outputs = list(outputs)
        self._total = total

    def __repr__(self) -> str:
        return (
            f"<smp.StepOutput of {len(self.outputs)} microbatches: {self.outputs[0]!r}>"
        )

    def reduce_sum(self) -> _Value:
        """Sum over microbatches, added in order; shape of one microbatch's value."""
        if self._total is not None:
            return self._total
        if isinstance(self.outputs[0], tf.IndexedSlices):
            return tf.IndexedSlices(
                tf.concat([each.values for each in self.outputs], 0),
                tf.concat([each.indices for each in self.outputs], 0),
                self.outputs[0].dense_shape,
            )
        return functools.reduce(tf.add, self.outputs)

    def reduce_mean(self) -> _Value:
        """Mean over microbatches; shape of one microbatch's value."""
        return self._divide(self.reduce_sum())

    def accumulate(
        self, method: str = "variable", var: tf.Variable | None = None
    ) -> _Value:
        """Mean over microbatches without holding all: each gradient is added to a
        running sum as soon as its microbatch is done.

        Inside a ``tf.function`` only the sum lives on; a step that is called eagerly
        returns its microbatches too, and they are held as long as this object.

        Args:
            method: "variable" (the running sum, the default), "add_n" or "accumulate_n"
                (that operation over all microbatches).
            var: with "variable", a variable that is assigned the mean.

        Raises:
            ValueError: unknown method.
        """
        merge: dict[str, Callable[[], _Value]] = {
            "variable": self.reduce_sum,
            "add_n": lambda: tf.add_n(self._dense()),
            "accumulate_n": lambda: tf.math.accumulate_n(self._dense()),
        }
        if method not in merge:
            raise ValueError(
                f"StepOutput.accumulate knows {sorted(merge)}: method={method!r}"
            )
        mean = self._divide(merge[method]())
        if var is not None and method == "variable":
            var.assign(tf.convert_to_tensor(mean))
        return mean

    def concat(self, axis: int = 0) -> tf.Tensor:
        """The M values one after the other along ``axis``; scalars cannot."""
        return tf.concat(self._dense(), axis)

    def stack(self, axis: int = 0) -> tf.Tensor:
        """The M values along a new ``axis``: [M, ...]."""
        return tf.stack(self._dense(), axis)

    def merge(self) -> tf.Tensor:
        """The values of the whole batch, joined along its axis; scalars are stacked."""
        return self.stack() if self.outputs[0].shape.rank == 0 else self.concat()

    def _dense(self) -> list[tf.Tensor]:
        return [tf.convert_to_tensor(each) for each in self.outputs]

    def _divide(self, total: _Value) -> _Value:
        count = len(self.outputs)
        if isinstance(total, tf.IndexedSlices):
            mean = total.values / tf.cast(count, total.values.dtype)
            return tf.IndexedSlices(mean, total.indices, total.dense_shape)
        if total.dtype.is_integer:
            return total // tf.cast(count, total.dtype)
        return total / tf.cast(count, total.dtype)
