"""Variables that take no memory until it is known who owns them.

    created         shape and type from a trace of the initializer; no value
      |  partitioned: owned here -> the traced initializer runs (``place``)
      |               elsewhere  -> reading raises and names the owner
      |  read or set before that -> it gets its value at once
    ordinary        a ResourceVariable like any other

The values are those of one process that creates the same variables in the same order:
the initializer's Python runs once, at creation, with the seeds that it would have drawn
there; only its operations run later. An initializer that cannot wait (it depends on a
variable, or on an operation with its own seed and a state) runs at creation.
"""

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import tensorflow as tf

from smp_tf.errors import SmpError
from smp_tf.frontend.hooks import graphs, initial_values, tracking

# Called stateful because they depend on the device.
_PURE = ("Placeholder", "StatelessRandomGetAlg", "StatelessRandomGetKeyCounter")

_is_deferring = contextvars.ContextVar[bool | None]("_is_deferring", default=None)
"""What the innermost ``delay_param_initialization`` says; None outside of all."""


class DeferredVariable(initial_values.ResourceVariable):
    """A variable without a value: not yet, or because another partition owns it.

    The class of an object while that holds. When it gets its value it becomes an
    ordinary ResourceVariable: the same object with the same handle, which traced graphs
    have captured.
    """

    _smp_initial: Any = None  # the traced initializer
    _smp_owner: int | None = None  # partition that has the value, when not this one

    @property
    def _handle(self) -> None:
        """What an eager operation that is given a variable looks for, to read it past
        all methods. Without a handle it asks for the value, as a graph does."""

    @property
    def handle(self) -> Any:
        return initial_values.handle_of(self)

    def __repr__(self) -> str:
        if self._smp_owner is None:
            self._smp_get_ready()
            return repr(self)
        return (
            f"<tf.Variable {self.name!r} shape={self.shape} dtype={self.dtype.name},"
            f" value on partition {self._smp_owner}>"
        )

    def _smp_get_ready(self) -> None:
        """Called before the value is used."""
        if initial_values.is_read_later():
            return
        self._smp_require_local()
        with tf.init_scope():
            _initialize(self)

    def _smp_require_local(self) -> None:
        if self._smp_owner is not None:
            raise SmpError(
                "a rank has the values of its own partition only:"
                f" variable={self.name!r} partition={self._smp_owner}; use it on the"
                " ranks of that partition, or before the first step"
            )

    # Whoever sets all of it need not know what was there.

    def assign(self, *args: Any, **kwargs: Any) -> Any:
        if not tf.executing_eagerly():
            self._smp_get_ready()
            return super().assign(*args, **kwargs)
        self._smp_require_local()
        result = super().assign(*args, **kwargs)
        _make_ordinary(self)
        return result

    def _restore_from_tensors(self, *args: Any, **kwargs: Any) -> Any:
        self._smp_require_local()
        result = super()._restore_from_tensors(*args, **kwargs)
        _make_ordinary(self)
        return result

    # TensorFlow asks the class of an object for the newer interface first.
    _serialize_to_tensors = initial_values.ResourceVariable._serialize_to_tensors

    def _gather_saveables_for_checkpoint(self) -> dict[str, Any]:
        return {tracking.VALUE: functools.partial(tracking.VariableSaveable, self)}


def _ready_first(name: str) -> Callable[..., Any]:
    """A method of ResourceVariable that uses the value."""
    ordinary = getattr(initial_values.ResourceVariable, name)

    def method(self: DeferredVariable, *args: Any, **kwargs: Any) -> Any:
        self._smp_get_ready()
        return ordinary(self, *args, **kwargs)

    method.__name__ = name
    return method


for _name in (
    "_copy_trackable_to_cpu",
    "_export_to_saved_model_graph",
    "_read_variable_op",
    "_strided_slice_assign",
    "assign_add",
    "assign_sub",
    "batch_scatter_update",
    "count_up_to",
    "gather_nd",
    "is_initialized",  # saving skips what is not, without a word
    "read_value_no_copy",
    "scatter_add",
    "scatter_div",
    "scatter_max",
    "scatter_min",
    "scatter_mul",
    "scatter_nd_add",
    "scatter_nd_max",
    "scatter_nd_min",
    "scatter_nd_sub",
    "scatter_nd_update",
    "scatter_sub",
    "scatter_update",
    "sparse_read",
):
    setattr(DeferredVariable, _name, _ready_first(_name))


def _make_ordinary(variable: Any) -> None:
    variable._smp_initial = None
    variable.__class__ = initial_values.ResourceVariable


def _initialize(variable: Any) -> None:
    with tf.device(variable.handle.device):
        value = initial_values.run_as_written(variable._smp_initial)
    initial_values.assign_raw(variable, value)
    _make_ordinary(variable)


# --- after partitioning ---------------------------------------------------------------


def place(variables: Sequence[Any], owner: Mapping[int, int], partition: int) -> None:
    """Give the variables that ``partition`` owns their values; free the others.

    Args:
        variables: of any kind; those that were neither deferred nor made movable stay
            as they are.
        owner: id of a variable's handle -> partition; one that is missing is owned by
            every partition.

    Raises:
        SmpError: this process gave up the value in an earlier session.
    """
    with tf.init_scope():
        for each in variables:
            variable = initial_values.variable_of(each.handle)
            if variable is not None:
                variable._smp_placed = True
            if not hasattr(variable, "_smp_owner"):  # never deferred, nor movable
                continue
            found = owner.get(id(each.handle), partition)
            if found != partition:
                _give_up(variable, found)
            elif isinstance(variable, DeferredVariable):
                if variable._smp_owner is not None:
                    raise SmpError(
                        "a variable went to another partition in a session that has"
                        f" ended, and its value with it: variable={variable.name!r};"
                        " build the model again in this session"
                    )
                _initialize(variable)


def make_movable(variables: Sequence[Any]) -> None:
    """Let ``place`` free variables that have their values already, and that other
    partitions own. Those of TensorFlow's special kinds stay everywhere."""
    for each in variables:
        variable = initial_values.variable_of(each.handle)
        if type(variable) is initial_values.ResourceVariable:
            variable._smp_owner = None


def value_of(variable: Any) -> tf.Tensor:
    """The value that a variable has, or would get now; a deferred one stays deferred.

    Raises:
        SmpError: another partition has it.
    """
    found = initial_values.variable_of(variable.handle)
    with tf.device(variable.handle.device):
        # Not asked of the class, which may be that of a stand-in for a while.
        if getattr(found, "_smp_owner", None) is not None:
            found._smp_require_local()
        if getattr(found, "_smp_initial", None) is not None:
            return initial_values.run_as_written(found._smp_initial)
        return initial_values.read_raw(variable)


def owner_elsewhere(variable: Any) -> int | None:
    """The partition that has the value of a variable, None if this process has it."""
    return getattr(initial_values.variable_of(variable.handle), "_smp_owner", None)


def is_placed(variable: Any) -> bool:
    """Whether a step uses the variable: some partition, or each, has its value."""
    return hasattr(initial_values.variable_of(variable.handle), "_smp_placed")


def _give_up(variable: Any, owner: int) -> None:
    if not isinstance(variable, DeferredVariable):
        initial_values.assign_raw(variable, tf.zeros([0], variable.dtype))
        variable.__class__ = DeferredVariable
    variable._smp_initial, variable._smp_owner = None, owner


# --- creation -------------------------------------------------------------------------


@contextlib.contextmanager
def delay_param_initialization(enabled: bool = True) -> Iterator[None]:
    """Variables created inside take no memory until a step has partitioned the model;
    then each rank allocates those of its own partition.

    That is the default for a ``DistributedModel``; ``enabled=False`` switches it off
    for the models that are built inside.
    """
    token = _is_deferring.set(bool(enabled))
    creator = tf.variable_creator_scope(_create) if enabled else None
    try:
        with creator or contextlib.nullcontext():
            yield
    finally:
        _is_deferring.reset(token)


@contextlib.contextmanager
def deferring(by_default: bool = True) -> Iterator[bool]:
    """As the innermost ``delay_param_initialization`` says, or the default; yields
    which."""
    said = _is_deferring.get()
    enabled = by_default if said is None else said
    with delay_param_initialization(enabled):
        yield enabled


def _create(next_creator: Callable[..., Any], **kwargs: Any) -> Any:
    initial_value: Any = kwargs.get("initial_value")
    if _is_deferring.get() and _is_of_checkpoint(initial_value):
        restored = next_creator(**kwargs)
        restored._smp_owner = None  # so that ``place`` may give it up
        return restored
    if not _is_deferring.get() or not _can_wait(initial_value, kwargs):
        return next_creator(**kwargs)
    dtype = kwargs.get("dtype")
    with tf.init_scope():
        initial = _trace_or_run(
            lambda: tf.convert_to_tensor(initial_value(), dtype=dtype)
        )
    value = initial if tf.is_tensor(initial) else initial.outputs[0]
    shape = kwargs.get("shape")
    if shape is None:
        shape = value.shape
    elif not value.shape.is_compatible_with(shape):
        raise ValueError(
            f"the initial value's shape {value.shape} does not fit the variable's"
            f" shape: variable={kwargs.get('name')!r} shape={shape}"
        )
    variable = initial_values.UninitializedVariable(
        trainable=kwargs.get("trainable"),
        name=kwargs.get("name"),
        shape=shape,
        dtype=value.dtype.base_dtype,
        constraint=kwargs.get("constraint"),
        synchronization=kwargs.get("synchronization"),
        aggregation=kwargs.get("aggregation"),
    )
    variable.__class__ = DeferredVariable
    variable._smp_owner = None  # of the object: ``place`` asks for it in any class
    if tf.is_tensor(initial):
        with tf.init_scope():
            initial_values.assign_raw(variable, initial)
        _make_ordinary(variable)
    else:
        variable._smp_initial = initial
    return variable


def _is_of_checkpoint(initial_value: Any) -> bool:
    return isinstance(initial_value, initial_values.CheckpointInitialValueCallable)


def _can_wait(initial_value: Any, kwargs: Mapping[str, Any]) -> bool:
    """False for constants, and for what only TensorFlow's own creators can make."""
    with tf.init_scope():
        is_eager = tf.executing_eagerly()
    return (
        is_eager
        and callable(initial_value)
        and not _is_of_checkpoint(initial_value)
        and not tf.distribute.has_strategy()
        and kwargs.get("caching_device") is None
        and kwargs.get("variable_def") is None
        and kwargs.get("use_resource") is not False
        and kwargs.get("validate_shape") is not False
        and kwargs.get("experimental_enable_variable_lifting") is not False
    )


def _trace_or_run(initializer: Callable[[], tf.Tensor]) -> Any:
    """The FuncGraph of the initializer, or its value where it cannot wait."""
    before = initial_values.RandomState()
    try:
        with initial_values.eager_seeds() as seeds:
            graph = graphs.trace_function(initial_values.INITIAL_VALUE, initializer, [])
    except Exception:  # it needs a seed's state, or values: it shall have them
        return _run_again(initializer, before)
    if _is_pure(graph, seeds) and graph.outputs[0].shape.is_fully_defined():
        return graph
    return initial_values.run_as_written(graph)


def _run_again(initializer: Callable[[], tf.Tensor], before: Any) -> tf.Tensor:
    """Run eagerly what a trace has begun, as if there had been no trace."""
    traced = initial_values.RandomState()
    before.restore()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is unseeded and being called multiple")
        value = initializer()
    # A Keras initializer draws its seed in its first call and keeps it.
    if initial_values.RandomState().is_keras_state_of(before):
        traced.restore_keras()
    return value


def _is_pure(graph: Any, seeds: Sequence[tuple[int, int]]) -> bool:
    """Whether it gives the same now and later."""
    if any(outside.dtype == tf.resource for outside, _ in graph.captures):
        return False
    for operation in graph.get_operations():
        if not operation.op_def.is_stateful or operation.type in _PURE:
            continue
        attributes = operation.node_def.attr
        if "seed2" not in attributes:
            return False
        if (attributes["seed"].i, attributes["seed2"].i) not in seeds:
            return False
    return True
