"""Variables that get their values late: the same values, once, and no memory before."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.frontend import variables
from smp_tf.frontend.variables import DeferredVariable
from tests.models.initial_values import every_initializer
from tests.unit.one_process import session

BIG = 10**12  # elements; no machine has the memory


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with session(microbatches=2):
        yield


def has_value(variable: Any) -> bool:
    return not isinstance(variable, DeferredVariable)


def deferred(initial_value: Any = None, **kwargs: Any) -> Any:
    with smp.delay_param_initialization():
        return tf.Variable(
            initial_value or (lambda: tf.random.normal([2, 3])), name="v", **kwargs
        )


def elsewhere(partition: int = 1, **kwargs: Any) -> Any:
    """A variable of another partition."""
    variable = deferred(**kwargs)
    variables.place([variable], {id(variable.handle): partition}, 0)
    return variable


def built(base: type) -> tuple[Any, np.ndarray]:
    """(the model with all its variables, what is drawn after that)."""
    tf.keras.utils.set_random_seed(7)
    model = every_initializer(base)
    if base is tf.keras.Model:
        model(tf.ones([2, 4]))
    else:
        smp.step(lambda x: model(x)).plan(tf.ones([4, 4]))
    layer = tf.keras.layers.Dense(2)
    layer.build([3])
    return model, tf.concat([tf.random.normal([2]), layer.kernel[0]], 0).numpy()


def test_initial_values_are_those_of_plain_keras() -> None:
    plain, drawn_after = built(tf.keras.Model)
    model, also_drawn = built(smp.DistributedModel)
    np.testing.assert_array_equal(drawn_after, also_drawn)
    assert len(plain.variables) == len(model.variables) == 36
    for one, other in zip(plain.variables, model.variables):
        np.testing.assert_array_equal(one, other, one.name)
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        assert one.trainable == other.trainable


def test_each_rank_has_the_values_whatever_it_owns() -> None:
    plain, _ = built(tf.keras.Model)
    for mine in (0, 1, 2):
        tf.keras.utils.set_random_seed(7)
        model = every_initializer(smp.DistributedModel)
        with smp.delay_param_initialization():
            tf.keras.Model.__call__(model, tf.keras.Input([4]))  # builds it all
        every = model.global_variables
        owner = {id(v.handle): i % 3 for i, v in enumerate(every)}
        variables.place(every, owner, mine)
        assert len(every) == 36
        for i, (one, other) in enumerate(zip(plain.variables, every)):
            if i % 3 == mine:
                np.testing.assert_array_equal(one, other, one.name)
            elif variables.owner_elsewhere(other) is not None:
                assert variables.owner_elsewhere(other) == i % 3
                with pytest.raises(smp.SmpError, match=f"partition={i % 3}"):
                    other.numpy()
            else:  # made from a tensor, as tf.Variable(tensor) always is
                assert "constant" in other.name


def test_no_memory_before_a_value_is_needed() -> None:
    variable = deferred(lambda: tf.zeros([BIG]) + tf.random.normal([BIG]))
    assert variable.shape == [BIG] and variable.dtype == tf.float32

    class Huge(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__()
            self.own = self.add_weight("own", [BIG])
            x = tf.keras.Input([BIG])
            self.inner = tf.keras.Model(x, tf.keras.layers.Dense(2)(x))
            self.dense = tf.keras.layers.Dense(BIG)

        def call(self, x: tf.Tensor) -> tf.Tensor:
            return self.inner(self.dense(x) + self.own)

    model = Huge()
    model.build([2, 5])
    shapes = sorted(variable.shape.as_list() for variable in model.global_variables)
    assert shapes == [[2], [5, BIG], [BIG], [BIG], [BIG, 2]]
    assert not any(map(has_value, model.global_variables))


def test_reading_gives_it_its_value() -> None:
    uses = {
        "numpy": lambda v: v.numpy(),
        "value": lambda v: v.value(),
        "read_value": lambda v: v.read_value(),
        "convert": tf.convert_to_tensor,
        "array": np.asarray,
        "add": lambda v: v + 0.0,
        "matmul": lambda v: tf.eye(2) @ v,
        "slice": lambda v: v[:, :],
        "gather": lambda v: tf.gather(v, [0, 1]),
        "function": lambda v: tf.function(lambda: v + 0.0)(),
        "assign_add": lambda v: v.assign_add(tf.zeros([2, 3])),
        "in init_scope": lambda v: tf.function(lambda: _read_in_init_scope(v))(),
    }
    for name, use in uses.items():
        tf.keras.utils.set_random_seed(1)
        want = tf.random.normal([2, 3])
        tf.keras.utils.set_random_seed(1)
        variable = deferred()
        handle = variable.handle
        tf.random.normal([2])  # too late to change anything
        assert not has_value(variable)
        np.testing.assert_array_equal(use(variable), want, name)
        assert type(variable) is type(tf.Variable(0.0)), name
        assert variable.handle is handle
    assert "numpy=" in repr(deferred()) and "array" in repr(deferred())
    assert deferred().is_initialized()


def _read_in_init_scope(variable: Any) -> tf.Tensor:
    with tf.init_scope():
        return variable.read_value()


def test_setting_it_needs_no_initial_value(tmp_path: Any) -> None:
    def fails() -> tf.Tensor:
        return tf.zeros([2, 3]) + tf.py_function(pytest.fail, ["ran"], tf.float32)

    variable = deferred(lambda: tf.random.normal([2, 3]))
    variable._smp_initial = None  # would raise if it ran
    assert variable.assign(tf.ones([2, 3])).shape == [2, 3]
    np.testing.assert_array_equal(variable, np.ones([2, 3]))
    checkpoint = tf.train.Checkpoint(v=variable).save(str(tmp_path / "c"))
    other = deferred()
    other._smp_initial = None
    tf.train.Checkpoint(v=other).restore(checkpoint).assert_consumed()
    np.testing.assert_array_equal(other, np.ones([2, 3]))
    variables.place([variable, other], {}, 0)  # what was set stays
    np.testing.assert_array_equal(variable, other)


def test_a_variable_of_another_partition_has_no_value(tmp_path: Any) -> None:
    uses = {
        "numpy": lambda v: v.numpy(),
        "value": lambda v: v.value(),
        "read_value": lambda v: v.read_value(),
        "convert": tf.convert_to_tensor,
        "array": np.asarray,
        "add": lambda v: v + 1,
        "gather": lambda v: tf.gather(v, [0]),
        "gather_nd": lambda v: v.gather_nd([[0]]),
        "assign": lambda v: v.assign(tf.ones([2, 3])),
        "assign_add": lambda v: v.assign_add(tf.ones([2, 3])),
        "scatter": lambda v: v.scatter_add(tf.IndexedSlices(tf.ones([1, 3]), [0])),
        "function": lambda v: tf.function(lambda: v + 1)(),
        "is_initialized": lambda v: v.is_initialized(),
        "save": lambda v: tf.train.Checkpoint(v=v).write(str(tmp_path / "c")),
    }
    for name, use in uses.items():
        with pytest.raises(smp.SmpError, match="variable='v:0' partition=3"):
            use(elsewhere(3))
            pytest.fail(name)
    assert "'v:0'" in repr(elsewhere(3)) and "partition 3" in repr(elsewhere(3))


def test_a_value_given_early_is_freed_where_it_is_not_owned() -> None:
    variable = deferred()
    variable.assign(tf.ones([2, 3]))
    handle = variable.handle
    variables.place([variable], {id(handle): 1}, 0)
    assert tf.raw_ops.ReadVariableOp(resource=handle, dtype=tf.float32).shape == [0]
    with pytest.raises(smp.SmpError, match="partition=1"):
        variable.numpy()
    variables.place([variable], {id(handle): 1}, 0)  # another step: nothing new
    with pytest.raises(smp.SmpError, match="build the model again"):
        variables.place([variable], {id(handle): 0}, 0)


def test_the_others_are_left_alone() -> None:
    plain = tf.Variable(1.0)
    variables.place([plain], {id(plain.handle): 1}, 0)
    assert plain.numpy() == 1.0
    assert has_value(deferred(tf.constant(2.0)))
    with smp.delay_param_initialization(enabled=False):
        assert has_value(deferred()) is False  # the innermost counts
    with smp.delay_param_initialization():
        with smp.delay_param_initialization(enabled=False):
            assert has_value(tf.Variable(lambda: 1.0))
        assert not has_value(tf.Variable(lambda: 1.0))
    assert has_value(tf.Variable(lambda: 1.0))


class Two(smp.DistributedModel):
    """One variable made in ``__init__``, the others in the first call."""

    def __init__(self) -> None:
        super().__init__(name="two")
        self.own = self.add_weight("own", [2], initializer="normal")
        self.dense = tf.keras.layers.Dense(2)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.dense(x) + self.own


def test_models_defer_by_default_and_can_be_told_not_to() -> None:
    found = []

    def step_of(model: Any) -> Any:
        def step(x: tf.Tensor) -> tf.Tensor:
            y = model(x)
            found[:] = [has_value(v) for v in model.weights]
            return y

        return smp.step(step)

    model = Two()
    assert not has_value(model.own)
    step_of(model)(tf.ones([4, 3]))
    assert found == [False, False, False] and all(map(has_value, model.weights))
    with smp.delay_param_initialization(enabled=False):
        model = Two()
    assert has_value(model.own)
    step_of(model)(tf.ones([4, 3]))
    assert found == [True, True, True]


def test_weights_before_the_first_step(tmp_path: Any) -> None:
    model = Two()
    model.build([2, 3])
    assert not any(map(has_value, model.weights))
    values = [np.full(v.shape, i, np.float32) for i, v in enumerate(model.weights)]
    model.set_weights(values)
    path = str(tmp_path / "weights.h5")
    model.save_weights(path)
    other = Two()
    other.build([2, 3])
    other.load_weights(path)
    smp.step(lambda x: other(x))(tf.ones([4, 3]))
    for variable, value in zip(other.weights, values):
        np.testing.assert_array_equal(variable, value)
    fresh = Two()
    fresh.build([2, 3])
    assert all(np.size(weight) for weight in fresh.get_weights())


def test_variables_as_keras_makes_them() -> None:
    """Names, constraints, mixed precision and partly known shapes are kept."""
    with smp.delay_param_initialization():
        layer = tf.keras.layers.Dense(
            2, kernel_constraint="non_neg", dtype="mixed_bfloat16", name="dense"
        )
        layer.build([3])
        ragged = tf.Variable(lambda: tf.ones([2]), shape=[None])
        with pytest.raises(ValueError, match="does not fit"):
            tf.Variable(lambda: tf.ones([2]), shape=[3])
    assert layer.kernel.name == "kernel:0" and layer.kernel.constraint is not None
    assert not has_value(layer.kernel._variable)
    assert layer(tf.ones([1, 3])).dtype == tf.bfloat16
    assert ragged.shape.as_list() == [None]
    ragged.assign([1.0, 2.0, 3.0])
    np.testing.assert_array_equal(ragged, [1, 2, 3])


def test_an_initializer_runs_once() -> None:
    calls = []

    def initializer() -> tf.Tensor:
        calls.append(tf.executing_eagerly())
        return tf.zeros([2])

    variable = deferred(initializer)
    assert variable.numpy().shape == (2,) and calls == [False]

    def broken() -> tf.Tensor:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        deferred(broken)
