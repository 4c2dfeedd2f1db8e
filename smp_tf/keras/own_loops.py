"""A plain Keras optimizer in a loop of one's own: what it must know of all partitions.

    gradients = [gradient.accumulate() for gradient in gradients]
    optimizer.apply_gradients(zip(gradients, model.trainable_variables))

On each rank that is one partition. A dynamic loss scale would halve on the rank that
has an infinity, and grow on the others, whose next gradients would be too large by as
much; ``global_clipnorm`` would be that of a part. So where an optimizer asks for either
its ranks come together, with as little as ``updates`` needs; all else is Keras's.
"""

from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.frontend.hooks import applying, graphs, recording
from smp_tf.frontend.variables import is_placed
from smp_tf.keras import updates
from smp_tf.runtime import session


def divert() -> None:
    """From now on, in this process."""
    applying.divert(_is_taken, _apply)


@graphs.unconverted
def _is_taken(optimizer: Any, pairs: Sequence[Any]) -> bool:
    """Whether these are gradients of one partition, and the optimizer asks for what the
    others have. The same on all ranks: none of them may be left waiting."""
    if updates.is_updating() or not session.is_initialized():
        return False
    if session.pp_size() == 1 or recording.is_tracing():
        return False
    if not updates.needs_whole_model(optimizer):
        return False
    # A rank that trains nothing gives nothing. Another model's are its own business.
    return not pairs or any(_is_of_model(variable) for _, variable in pairs)


def _is_of_model(variable: Any) -> bool:
    return isinstance(variable, tf.Variable) and is_placed(variable)


@graphs.unconverted
def _apply(
    optimizer: Any, pairs: Sequence[Any], plainly: Callable[[list[Any]], Any]
) -> Any:
    gradients = [gradient for gradient, _ in pairs]
    variables = [variable for _, variable in pairs]
    updates.apply_as_given(optimizer, gradients, variables, plainly)
    return optimizer.iterations
