"""Every private hook into TensorFlow and Keras, and a self-test of each.

=================  ===================================================================
``recording``      what is remembered of a step while it is traced
``graphs``         tracing a graph, leaving graphs and tapes, calling a function often
``initial_values`` variables whose initializer runs later
``applying``       a say in what optimizers apply, in loops of one's own
``exporting``      what a SavedModel needs of TensorFlow and Keras
``fitting``        what a model that fits in its own way needs of Keras
``kernels``        which devices an operation can run on
``loss_scales``    a loss scale that moves on a rank with nothing to train
``optimizer_slots`` where optimizers keep their slots, and when they make them
``resuming``       what a backup of a training needs of Keras
``tracking``       what checkpoints follow
``self_test``      whether all of them still do what this library needs
=================  ===================================================================

Nothing else in ``smp_tf`` imports what TensorFlow or Keras keep for themselves.
"""

import importlib.metadata

import tensorflow as tf

from smp_tf.errors import TraceError

KNOWN_VERSIONS = "2.18 to 2.21"


def refusal(failure: str) -> TraceError:
    """What to raise for a TensorFlow in which a hook is not as expected."""
    try:
        tf_keras = importlib.metadata.version("tf_keras")
    except importlib.metadata.PackageNotFoundError:
        tf_keras = "none"
    return TraceError(
        f"a private TensorFlow hook does not behave as expected: {failure};"
        f" tensorflow={tf.__version__} tf_keras={tf_keras},"
        f" known to work: {KNOWN_VERSIONS}; install one of these"
    )


# The hooks look up most places when they are imported: what is gone is told like what
# has changed.
try:
    from smp_tf.frontend.hooks import (  # noqa: F401
        fitting,
        graphs,
        initial_values,
        recording,
    )
except (AttributeError, ImportError) as error:
    raise refusal(f"{type(error).__name__}: {error}") from error
