"""A SavedModel of a partitioned model is that of the whole model, for plain TensorFlow.

The truth is what the pipeline predicts: a process that cannot import smp_tf loads what
was written and must predict the same.
"""

import contextlib
import os
import pathlib
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.keras.whole_weights import showing_all
from tests.checkpoint.export_models import CASES, Case, outputs_of, sequential, train
from tests.ranks import ranks, run_ranks
from tests.unit.one_process import session

K = tf.keras
LOADER = pathlib.Path(__file__).with_name("load_without.py")


def export(folder: pathlib.Path, names: list[str]) -> None:
    smp.init({"partitions": 2, "microbatches": 2})
    for name in names:
        K.utils.set_random_seed(1)
        case = CASES[name]
        model = case.build()
        train(model, case)
        check_exported(folder / name, model, case)
        train(model, case)  # on all ranks alike, still


def check_exported(folder: pathlib.Path, model: Any, case: Case) -> None:
    """Training goes on as if nothing had been written."""
    kind = type(model)
    weights = model.get_weights()
    model.save_model(folder / "model")
    assert type(model) is kind and "call" not in vars(model)
    for one, other in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    outputs = tf.nest.map_structure(
        lambda output: output.numpy(), outputs_of(model, case.inputs)
    )
    if smp.rank() == 0:
        expected = pickle.dumps((case.inputs, case.targets, outputs))
        (folder / "expected").write_bytes(expected)


@pytest.mark.timeout(430)
def test_opens_without_this_library(tmp_path: pathlib.Path) -> None:
    run_ranks(2, export, tmp_path, list(CASES), timeout=240)
    command = [sys.executable, str(LOADER), *(str(tmp_path / name) for name in CASES)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert result.returncode == 0, result.stdout + result.stderr
    words = [line.split() for line in result.stdout.splitlines()]
    classes = {name: kind for name, ok, kind, _ in words if ok == "ok"}
    assert classes == {
        "subclassed": "Net",
        "functional": "Functional",
        "sequential": "Sequential",
        "application": "Functional",
        "hugging_face": "TFBertForSequenceClassification",
    }


# --- the ways to it, and errors -------------------------------------------------------


X = np.random.RandomState(3).rand(8, 6).astype(np.float32)
Y = X[:, :3]


def check_same_outputs(path: pathlib.Path, model: Any) -> Any:
    """On rank 0, with TensorFlow alone."""
    outputs = outputs_of(model, X)
    if smp.rank() == 0:
        loaded = tf.saved_model.load(str(path))
        np.testing.assert_allclose(loaded(X), outputs, rtol=1e-5, atol=1e-6)
        return loaded
    return None


def raised(call: Callable[[], Any]) -> str:
    """The text of the SmpError that all ranks raise."""
    with pytest.raises(smp.SmpError) as caught:
        call()
    assert smp.allgather(str(caught.value), smp.WORLD) == [str(caught.value)] * 4
    return str(caught.value)


@contextlib.contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may be larger than so many bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def entries(folder: pathlib.Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def check_before_the_first_step(folder: pathlib.Path) -> None:
    model = sequential()
    assert "input_signature" in raised(lambda: model.save_model(folder / "early"))
    with pytest.raises(TypeError, match="list with a structure.*write"):
        model.save_model(folder / "early", input_signature=tf.TensorSpec([None, 6]))
    model.save_model(folder / "early", input_signature=[tf.TensorSpec([None, 6])])
    check_same_outputs(folder / "early", model)


def check_fit(model: Any, folder: pathlib.Path) -> None:
    """ModelCheckpoint writes the whole model; ``save`` does, too."""
    callback = K.callbacks.ModelCheckpoint(str(folder / "of-{epoch}"))
    model.fit(X, Y, batch_size=8, epochs=2, callbacks=[callback], verbose=0)
    check_same_outputs(folder / "of-2", model)
    assert entries(folder / "of-1") != entries(folder / "of-2")
    model.save(str(folder / "saved"), save_format="tf", include_optimizer=False)
    assert model.optimizer is not None
    check_same_outputs(folder / "saved", model)
    text = raised(lambda: model.save(str(folder / "saved"), overwrite=False))
    assert "overwrite=False" in text


def check_signatures(model: Any, folder: pathlib.Path) -> None:
    @tf.function(input_signature=[tf.TensorSpec([2, 6])])
    def twice(x: tf.Tensor) -> dict[str, tf.Tensor]:
        return {"twice": 2 * model(x)}

    path = folder / "signed"
    if smp.rank() == 0:
        (path / "code").mkdir(parents=True)
        (path / "code" / "mine").write_text("stays")
    smp.barrier()
    model.save_model(path, signatures={"twice": twice})
    loaded = check_same_outputs(path, model)
    if smp.rank() == 0:
        assert list(loaded.signatures) == ["twice"]
        found = loaded.signatures["twice"](x=tf.constant(X[:2]))["twice"]
        np.testing.assert_allclose(found, 2 * loaded(X)[:2], rtol=1e-5)
        assert (path / "code" / "mine").read_text() == "stays"
    model.save_model(path, input_signature=[tf.TensorSpec([8, None], name="rows")])
    loaded = check_same_outputs(path, model)
    if smp.rank() == 0:
        _, named = loaded.signatures["serving_default"].structured_input_signature
        assert [spec.shape.as_list() for spec in named.values()] == [[None, None]]
    assert model.save_spec()[0][0].shape == [None, 6]


def check_errors(model: Any, folder: pathlib.Path) -> None:
    """What is there is there afterwards."""
    (folder / "file").write_text("")
    path = folder / "signed"
    before = entries(path)
    model.set_weights([value + 1 for value in model.get_weights()])
    with full_disk():
        texts = [raised(lambda: model.save_model(folder / "new"))]
        texts += [raised(lambda: model.save_model(path))]
    texts += [raised(lambda: model.save_model(folder / "file" / "model"))]
    texts += [raised(lambda: model.save_model(folder / "file"))]
    for text, name in zip(texts, ["new", "signed", "file/model", "file"]):
        assert f"path='{folder / name}'" in text
    smp.barrier()
    assert entries(path) == before
    assert not list(folder.glob("*.new*")) and not list(path.glob(".new*"))

    @tf.function(input_signature=[tf.TensorSpec([8, 6])])
    def stepping(x: tf.Tensor) -> tf.Tensor:
        return smp.step(lambda x: model(x))(x).merge()

    text = raised(lambda: model.save_model(path, signatures=stepping))
    assert "step needs all ranks" in text
    traced = stepping.get_concrete_function()
    text = raised(lambda: model.save_model(path, signatures=traced))
    assert "this one calls a smp.step" in text
    assert entries(path) == before
    model.stepping = stepping  # has run; it is no part of the SavedModel
    model.save_model(path)
    assert model.stepping is stepping
    check_same_outputs(path, model)
    with showing_all():
        assert len(model.weights) == 4


@pytest.mark.timeout(190)
@ranks(4, timeout=170)
def test_all_ways_and_errors(tmp_path: pathlib.Path) -> None:
    smp.init({"partitions": 2, "microbatches": 2})
    K.utils.set_random_seed(2)
    check_before_the_first_step(tmp_path)
    model = sequential()
    check_fit(model, tmp_path)
    check_signatures(model, tmp_path)
    check_errors(model, tmp_path)


def test_one_process(tmp_path: pathlib.Path) -> None:
    """The optimizer's state is in it, as in plain Keras; a mount point is no hurdle."""
    with session(microbatches=2):
        model = sequential()
        model.fit(X, Y, verbose=0)
        os.mkdir(tmp_path / "mounted")
        model.save_model(tmp_path / "mounted")
        loaded = K.models.load_model(str(tmp_path / "mounted"))
        held = tf.train.list_variables(str(tmp_path / "mounted/variables/variables"))
        assert [name for name, _ in held if "optimizer/_variables" in name]
        np.testing.assert_allclose(
            loaded.predict(X, verbose=0), model.predict(X, verbose=0), rtol=1e-5
        )
        model.save(str(tmp_path / "saved"))
        with pytest.raises(smp.SmpError, match="already.*overwrite=False"):
            model.save(str(tmp_path / "saved"), overwrite=False)
