"""``run_eagerly=True``: the microbatches one after the other, as Python code.

For debugging in one process: a breakpoint in a layer's ``call`` stops there, prints
print, and values are NumPy arrays. The same losses, gradients and metrics as a pipeline
gives, slowly.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.frontend import variables
from smp_tf.keras.batches import Piece, num_rows, pieces_of, require_rows
from smp_tf.keras.steps import functions_of
from smp_tf.runtime import session
from smp_tf.runtime.step_output import StepOutput

_is_open = contextvars.ContextVar("_is_open", default=False)


def is_open() -> bool:
    """Whether a model may be called as what it is, a plain Keras model."""
    return _is_open.get()


@contextlib.contextmanager
def opened() -> Iterator[None]:
    """Inside, a model may be called as that."""
    token = _is_open.set(True)
    try:
        yield
    finally:
        _is_open.reset(token)


class OneByOne:
    """What ``steps.BatchSteps`` does, without a graph."""

    def __init__(self, model: Any) -> None:
        self._model, self._functions = model, functions_of(model)

    def run(self, name: str, data: Sequence[Any]) -> list[tuple[Piece, Any]]:
        """As ``BatchSteps.run``."""
        require_rows(name, data)
        count = session.config().microbatches
        rows = num_rows(data) or count
        # Eager operations read variables past the methods that would give them values.
        variables.place(self._model.global_variables, {}, session.pp_rank())
        found = []
        for piece in pieces_of(rows, count):
            factor = rows * piece.microbatches / piece.rows
            with opened(), variables.delay_param_initialization(False):
                results = [
                    self._functions[name](*(each.of(part) for part in data), factor)
                    for each in _microbatches(piece)
                ]
            found.append((piece, tf.nest.map_structure(_output, *results)))
        return found


def _microbatches(piece: Piece) -> list[Piece]:
    size = piece.rows // piece.microbatches
    return [
        Piece(piece.start + i * size, size, 1, 1.0) for i in range(piece.microbatches)
    ]


def _output(*values: Any) -> Any:
    return None if values[0] is None else StepOutput(values)
