"""What variables that get their value later need of TensorFlow and Keras."""

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2
from tensorflow.python.eager import context
from tensorflow.python.framework import func_graph as func_graph_lib
from tensorflow.python.framework import ops, random_seed
from tensorflow.python.ops import resource_variable_ops
from tensorflow.python.trackable import base as trackable
from tf_keras.src import backend as keras_backend

from smp_tf.frontend.hooks import recording
from smp_tf.frontend.hooks.graphs import concrete

UninitializedVariable = resource_variable_ops.UninitializedVariable
ResourceVariable = resource_variable_ops.ResourceVariable
CheckpointInitialValueCallable = trackable.CheckpointInitialValueCallable

INITIAL_VALUE = "smp_initial_value"  # name of the graph of an initializer

# Graphs that Keras traces for shapes only, by the end of their names.
_SCRATCH_GRAPHS = ("_scratch_graph", "keras_graph", "build_graph")


def is_read_later() -> bool:
    """True where reading a variable only writes a node: in the step's own graph, which
    runs after partitioning, and in Keras's scratch graphs, which never run."""
    graph = ops.get_default_graph()  # tf.init_scope keeps it
    while isinstance(graph, func_graph_lib.FuncGraph) and not tf.executing_eagerly():
        if graph.name == INITIAL_VALUE:
            return False
        if recording.is_step(graph):
            return True
        if graph.name.endswith(_SCRATCH_GRAPHS):
            return True
        graph = graph.outer_graph
    return False


def variable_of(handle: Any) -> Any:
    """The variable object that a resource handle was made for, None if unknown."""
    parent = getattr(handle, "_parent_trackable", None)
    return None if parent is None else parent()


def handle_of(variable: Any) -> Any:
    """The resource handle of a variable object, whatever its class makes of it."""
    return vars(variable)["_handle"]


def assign_raw(variable: Any, value: Any) -> None:
    """Set the resource to any value, of any shape."""
    with tf.device(variable.handle.device):
        tf.raw_ops.AssignVariableOp(resource=variable.handle, value=value)


def read_raw(variable: Any) -> Any:
    """The value of the resource, whatever the variable casts it to."""
    return tf.raw_ops.ReadVariableOp(resource=variable.handle, dtype=variable.dtype)


class ExplicitSeedError(Exception):
    """An operation with state and its own seed: each run gives other numbers."""


@contextlib.contextmanager
def eager_seeds() -> Iterator[list[tuple[int, int]]]:
    """Let random operations of the graph traced inside have the seeds that they would
    draw when run eagerly here; yields the list of them.

    Raises:
        ExplicitSeedError: from the operation, inside.
    """
    original = random_seed.get_seed
    outer = ops.get_default_graph()
    drawn: list[tuple[int, int]] = []

    def get_seed(op_seed: int | None) -> Any:
        here = ops.get_default_graph()
        if here is outer or getattr(here, "outer_graph", None) is not outer:
            return original(op_seed)
        if op_seed is not None:
            raise ExplicitSeedError(op_seed)
        with tf.init_scope():
            seeds = original(None)
        drawn.append((seeds[0] or 0, seeds[1] or 0))
        return seeds

    random_seed.get_seed = get_seed
    try:
        yield drawn
    finally:
        random_seed.get_seed = original


class RandomState:
    """The state of every generator that initializers draw seeds or numbers from."""

    def __init__(self) -> None:
        self._eager = getattr(context.context(), "_rng", None)  # once seeded
        self._keras = getattr(keras_backend._SEED_GENERATOR, "generator", None)
        self._eager_state = self._eager.getstate() if self._eager else None
        self._keras_state = self._keras.getstate() if self._keras else None
        self._python_state = random.getstate()
        self._numpy_state = np.random.get_state()

    def restore(self) -> None:
        self.take_over(self.content())

    def content(self) -> tuple[Any, ...]:
        """The states themselves, for another process; None of what was not seeded."""
        return (
            self._eager_state,
            self._keras_state,
            self._python_state,
            self._numpy_state,
        )

    def take_over(self, content: tuple[Any, ...]) -> None:
        """Go on from these states."""
        eager, keras, python, numpy = content
        if self._eager and eager:
            self._eager.setstate(eager)
        if self._keras and keras:
            self._keras.setstate(keras)
        random.setstate(python)
        np.random.set_state(numpy)

    def is_keras_state_of(self, other: "RandomState") -> bool:
        return self._keras_state == other._keras_state

    def restore_keras(self) -> None:
        if self._keras:
            self._keras.setstate(self._keras_state)


@contextlib.contextmanager
def kept_layer_seeds(model: Any) -> Iterator[None]:
    """A Keras layer with a seed (a Dropout) takes the next one in each trace; put them
    back, so that the trace inside does not count."""
    generators = [
        each._random_generator
        for each in (model, *model.submodules)
        if hasattr(getattr(each, "_random_generator", None), "_seed")
    ]
    before = [generator._seed for generator in generators]
    try:
        yield
    finally:
        for generator, seed in zip(generators, before, strict=True):
            generator._seed = seed


def run_as_written(graph: func_graph_lib.FuncGraph) -> tf.Tensor:
    """Run a graph of one output without any rewriting: bit for bit as eagerly."""
    options = config_pb2.ConfigProto()
    options.graph_options.rewrite_options.disable_meta_optimizer = True
    options.graph_options.optimizer_options.opt_level = (
        config_pb2.OptimizerOptions.Level.L0
    )
    current = context.context()
    kept = current.function_call_options
    current.function_call_options = context.FunctionCallOptions(
        kept.executor_type, options
    )
    try:
        return concrete(graph)()
    finally:
        current.function_call_options = kept
