"""Weights of a partitioned model are those of the whole model, on every rank.

The truth is the same model in plain Keras: what it writes is read here, what is written
here is read by it, bit for bit.
"""

import contextlib
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import h5py
import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.frontend.variables import DeferredVariable
from smp_tf.keras.whole_weights import VariableSpec
from tests.ranks import ranks
from tests.unit.one_process import session

K = tf.keras
FORMATS = ("weights", "weights.h5", "of_v3.weights.h5", "weights.keras")


class Block(K.layers.Layer):
    """Weights of other dtypes, some of which no step uses."""

    def __init__(self, has_all_dtypes: bool) -> None:
        super().__init__(name="block")
        self.wide = K.layers.Dense(6, name="wide")
        self.half = self.add_weight("half", [6], tf.float16, "ones")
        self.calls = self.add_weight("calls", [], tf.int64, "zeros", trainable=False)
        if has_all_dtypes:  # HDF5 has none of these
            self.brain = self.add_weight("brain", [5, 2], tf.bfloat16, "normal")
            self.scale = self.add_weight("scale", [], tf.bfloat16, "ones")
            self.names = tf.Variable(["a", "bc"], trainable=False, name="names")
            self.name_ = tf.Variable("def", trainable=False, name="name")

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.wide(x) * tf.cast(self.half, x.dtype)


def build(base: type, has_all_dtypes: bool) -> Any:
    class Net(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="net")
            self.own = self.add_weight("own", [4, 4], initializer="glorot_uniform")
            self.first = [K.layers.Dense(8, "relu", name=f"d{i}") for i in range(3)]
            self.norm = K.layers.BatchNormalization(name="norm")
            self.block = Block(has_all_dtypes)
            self.inner = K.Sequential(
                [
                    K.layers.Dense(5, input_shape=[6], name="e0"),
                    K.layers.Dense(3, name="e1"),
                ],
                name="inner",
            )

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            x = x @ self.own
            for layer in self.first:
                x = layer(x)
            return self.inner(self.block(self.norm(x, training=training)))

    return Net()


def plain(seed: int = 1, has_all_dtypes: bool = False) -> Any:
    K.utils.set_random_seed(seed)
    model = build(K.Model, has_all_dtypes)
    model(tf.ones([2, 4]))
    return model


def distributed(seed: int = 1, has_all_dtypes: bool = False) -> Any:
    K.utils.set_random_seed(seed)
    model = build(smp.DistributedModel, has_all_dtypes)
    train(model, 1)
    return model


def train(model: Any, steps: int) -> None:
    """Plain gradient descent: other values everywhere, the same for any partition."""

    def loss(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            y = model(x, training=True)
            total = tf.reduce_sum(y**2)
        return tape.gradient(total, variables())

    def variables() -> list[tf.Variable]:
        return [v for v in model.trainable_variables if v.dtype == tf.float32]

    for _ in range(steps):
        gradients = smp.step(loss)(tf.reshape(tf.range(16.0) / 16, [4, 4]))
        for gradient, variable in zip(gradients, variables(), strict=True):
            variable.assign_sub(0.01 * gradient.reduce_mean())


def check_same(found: Any, expected: Any) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert one.dtype == other.dtype and one.shape == other.shape
        np.testing.assert_array_equal(one, other)


def raised(kind: type[Exception], call: Callable[[], Any]) -> str:
    with pytest.raises(kind) as caught:
        call()
    return str(caught.value)


def check_given_up(model: Any) -> None:
    """A rank holds its own part, and nothing else, as before."""
    mine = {id(variable) for variable in model.variables}
    elsewhere = [v for v in model.global_variables if id(v) not in mine]
    assert elsewhere or smp.pp_size() == 1
    for variable in elsewhere:
        if "name" in variable.name:  # made from a value, and never deferred
            continue
        assert type(variable) is DeferredVariable
        held = tf.raw_ops.VariableShape(input=variable.handle).numpy()
        assert list(held) == [0], variable.name
    for variable in model.variables:
        assert not isinstance(variable, DeferredVariable)
        assert variable.device == variable.handle.device


@contextlib.contextmanager
def launched(partitions: int) -> Iterator[None]:
    smp.init({"partitions": partitions, "microbatches": 2})
    yield
    smp.shutdown()


def check_saving(folder: pathlib.Path, has_all_dtypes: bool) -> Any:
    truth, model = plain(1, has_all_dtypes), distributed(1, has_all_dtypes)
    names = [v.name for v in truth.weights]
    assert [spec.name for spec in model.global_variable_specs] == names
    # The truth after the same steps: what each rank has of its own part.
    parts = smp.allgather(
        {v.name: v.numpy() for v in model.variables}, smp.WORLD
    )
    merged = {name: value for part in reversed(parts) for name, value in part.items()}
    everything = model.get_weights()
    check_same(everything, [merged[name] for name in names])
    assert not np.array_equal(everything[1], truth.get_weights()[1])
    assert model.count_params() == truth.count_params()
    check_given_up(model)
    for name in FORMATS[: 1 if has_all_dtypes else None]:
        file = str(folder / name)
        model.save_weights(file)
        other = plain(2, has_all_dtypes)
        other.load_weights(file)
        check_same(other.get_weights(), everything)
        check_given_up(model)
        smp.barrier()
    return model


def check_loading(model: Any, folder: pathlib.Path, has_all_dtypes: bool) -> None:
    before = model.get_weights()
    formats = FORMATS[: 1 if has_all_dtypes else None]
    for seed, name in enumerate(formats, start=5):
        file, other = str(folder / f"plain_{name}"), plain(seed, has_all_dtypes)
        if smp.rank() == 0:
            other.save_weights(file)
        smp.barrier()
        status = model.load_weights(file)
        assert (status is None) == (name != "weights")
        if status is not None:
            status.assert_consumed().assert_existing_objects_matched()
            status.expect_partial().assert_nontrivial_match()
        check_same(model.get_weights(), other.get_weights())
        check_given_up(model)
    if not has_all_dtypes:
        model.load_weights(str(folder / "weights.h5"), by_name=True)
        check_same(model.get_weights(), before)
    train(model, 1)  # the step goes on with what was loaded


def check_setting(model: Any) -> None:
    values = plain(seed=9).get_weights()
    model.set_weights(values)
    check_same(model.get_weights(), values)
    check_given_up(model)
    changed = [values[0] + 1, *values[1:]]
    wrong = [*changed[:-1], np.zeros([2, 2], np.float32)]
    assert "not compatible" in raised(ValueError, lambda: model.set_weights(wrong))
    few = raised(ValueError, lambda: model.set_weights(changed[1:]))
    assert f"length {len(values) - 1}" in few
    check_same(model.get_weights(), values)


def check_errors(model: Any, folder: pathlib.Path) -> None:
    before = model.get_weights()
    (folder / "taken").write_text("a file")
    wrong = K.Sequential([K.layers.Dense(1, input_shape=[3])])
    names = ("wrong", "wrong.h5", "wrong.weights.h5")
    if smp.rank() == 0:
        for name in names:
            wrong.save_weights(str(folder / name))
        other = plain()
        other.block.wide.kernel = tf.Variable(tf.zeros([2, 2]))
        other.save_weights(str(folder / "shapes.h5"))
        other.save_weights(str(folder / "shapes"))
    smp.barrier()
    calls = [
        lambda name=name: model.load_weights(str(folder / name))
        for name in ("none", "none.h5", "none.weights.h5", *names[1:], "shapes.h5")
    ]
    calls += [lambda: model.load_weights(str(folder / "shapes"))]
    calls += [
        lambda name=name: model.save_weights(str(folder / "taken" / name))
        for name in FORMATS
    ]
    calls += [lambda: model.save_weights(str(folder / "wrong.h5"), overwrite=False)]
    calls += [lambda: model.save_weights(str(folder / "wrong"), overwrite=False)]
    calls += [lambda: model.save_weights(str(folder / "x"), save_format="no such")]
    for call in calls:
        text = raised(Exception, call)
        texts = smp.allgather(text, smp.WORLD)
        assert text and texts == [text] * smp.size()
        check_given_up(model)
        check_same(model.get_weights(), before)


@ranks(2, timeout=110)
def test_files_of_two_ranks(tmp_path: pathlib.Path) -> None:
    with launched(2):
        for has_all_dtypes in (True, False):
            model = check_saving(tmp_path, has_all_dtypes)
            check_loading(model, tmp_path, has_all_dtypes)


@ranks(2, timeout=110)
def test_setting_and_errors(tmp_path: pathlib.Path) -> None:
    with launched(2):
        model = distributed()
        check_setting(model)
        check_errors(model, tmp_path)


def compiled(base: type) -> Any:
    """One layer computes in another dtype; the configuration is in the code."""

    class Compiled(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="late")
            dtypes = {6: None, 5: "mixed_float16", 3: None}
            self.layer = [
                K.layers.Dense(
                    n, dtype=dtype, name=f"l{n}", bias_initializer="normal"
                )
                for n, dtype in dtypes.items()
            ]

        def call(self, x: tf.Tensor) -> tf.Tensor:
            for layer in self.layer:
                x = layer(x)
            return x

        def get_config(self) -> dict[str, Any]:
            return {}

        @classmethod
        def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
            return cls()

    model = Compiled()
    model.compile("adam", "mse", metrics=["mae"])
    return model


@ranks(2, timeout=110)
def test_optimizers_stay_out_of_files(tmp_path: pathlib.Path) -> None:
    """A rank's optimizer has the state of its own variables, by their place."""
    K.utils.set_random_seed(3)
    truth = compiled(K.Model)
    truth.fit(np.ones([4, 4]), np.ones([4, 3]), verbose=0)
    with launched(2):
        if smp.rank() == 0:
            truth.save_weights(str(tmp_path / "plain.weights.h5"))
        smp.barrier()
        model = compiled(smp.DistributedModel)
        smp.step(lambda x: model(x))(tf.ones([4, 4]))
        model.set_weights(truth.get_weights())
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)
        optimizer.iterations.assign(7)
        model.save(str(tmp_path / "w.keras"))
        for name in ("w", "w.h5", "w.weights.h5", "w.keras", "plain.weights.h5"):
            file = str(tmp_path / name)
            if not pathlib.Path(file).exists():
                model.save_weights(file)
            model.set_weights([0 * value for value in truth.get_weights()])
            model.load_weights(file)
            check_same(model.get_weights(), truth.get_weights())
            assert model.optimizer is optimizer
            assert "optimizer" in model._trackable_children()
            if name == "w.weights.h5":
                with h5py.File(file) as content:
                    assert "optimizer" not in content
        held = [name for name, _ in tf.train.list_variables(str(tmp_path / "w"))]
        assert held and not [name for name in held if "optimizer" in name]
        status = model.load_weights(str(tmp_path / "w"))
        status.assert_consumed()
        assert optimizer.iterations == 7  # nobody has set it
        custom = {"Compiled": type(truth)}
        again = K.models.load_model(str(tmp_path / "w.keras"), custom, compile=False)
        check_same(again.get_weights(), truth.get_weights())
        call = [model.load_weights, model.save_weights][smp.rank()]
        text = raised(smp.SmpError, lambda: call(str(tmp_path / "w")))
        assert "rank 0: late.load_weights, rank 1: late.save_weights" in text


@ranks(2, timeout=110)
def test_loading_before_the_first_step(tmp_path: pathlib.Path) -> None:
    """Each rank reads it; what it does not own is freed, also what was created late."""
    truth = plain(seed=4)
    with launched(2):
        for name in ("w", "w.h5"):
            if smp.rank() == 0:
                truth.save_weights(str(tmp_path / name))
        smp.barrier()
        late = build(smp.DistributedModel, False)
        late.load_weights(str(tmp_path / "w"))  # there are no variables yet
        early = build(smp.DistributedModel, False)
        early.build([2, 4])
        early.load_weights(str(tmp_path / "w.h5"))
        check_same(early.get_weights(), truth.get_weights())
        early.save_weights(str(tmp_path / "again"))
        again = plain(seed=5)
        again.load_weights(str(tmp_path / "again"))
        check_same(again.get_weights(), truth.get_weights())
        for model in (late, early):
            smp.step(lambda x: model(x)).plan(tf.ones([4, 4]))
            check_same(model.get_weights(), truth.get_weights())
            check_given_up(model)


@ranks(3, timeout=110)
def test_three_ranks(tmp_path: pathlib.Path) -> None:
    with launched(3):
        model = check_saving(tmp_path, False)
        check_loading(model, tmp_path, False)


@ranks(4, timeout=115)
def test_replicas(tmp_path: pathlib.Path) -> None:
    """One rank reads and writes for all; every replica has the same."""
    with launched(2):
        model = distributed()
        before = model.get_weights()
        file = str(tmp_path / "w")
        model.save_weights(file)
        changed = [value + 1 for value in before]
        model.set_weights(changed)
        model.load_weights(file)
        for each in smp.allgather(model.get_weights(), smp.WORLD):
            check_same(each, before)
        check_given_up(model)
        text = raised(Exception, lambda: model.load_weights(str(tmp_path / "none")))
        assert smp.allgather(text, smp.WORLD) == [text] * 4


@ranks(2, timeout=110)
def test_replicas_of_a_whole_model(tmp_path: pathlib.Path) -> None:
    with launched(1):
        model = distributed()
        file = str(tmp_path / "w")
        model.save_weights(file)
        before = model.get_weights()
        model.set_weights([value + 1 for value in before])
        model.load_weights(file)
        check_same(model.get_weights(), before)
        text = raised(Exception, lambda: model.save_weights(file, overwrite=False))
        assert "overwrite=True" in text
        assert smp.allgather(text, smp.WORLD) == [text] * 2


def test_one_process(tmp_path: pathlib.Path) -> None:
    """Plain Keras does it."""
    with session(microbatches=2):
        model = distributed()
        assert model.count_params() == plain().count_params()
        values = plain(seed=6).get_weights()
        model.set_weights(values)
        for name in FORMATS:
            file = str(tmp_path / name)
            model.save_weights(file)
            other = plain(seed=7)
            other.load_weights(file)
            check_same(other.get_weights(), values)
            model.set_weights([0 * value for value in values])
            model.load_weights(file)
            check_same(model.get_weights(), values)
        spec = model.global_variable_specs[0]
        assert spec == VariableSpec("net/d0/kernel:0", (4, 8), "float32", 0)


def test_mixed_precision_before_the_first_step(tmp_path: pathlib.Path) -> None:
    """What was loaded is not overwritten by the initial values, in no format."""
    truth = compiled(K.Model)
    truth.build([2, 4])
    with session(microbatches=2):
        for name in FORMATS:
            file = str(tmp_path / name)
            truth.save_weights(file)
            model = compiled(smp.DistributedModel)
            model.build([2, 4])
            model.load_weights(file)
            smp.step(lambda x: model(x))(tf.ones([4, 4]))
            check_same(model.get_weights(), truth.get_weights())
