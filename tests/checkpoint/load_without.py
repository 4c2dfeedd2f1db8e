"""Run by a test in a process that cannot import smp_tf: open what was exported.

For each folder: python load_without.py FOLDER .. ; ``expected`` in it is a pickle of
inputs, targets and outputs.
"""

import pathlib
import pickle
import sys
from typing import Any

sys.modules["smp_tf"] = None  # type: ignore[assignment]

import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402

K = tf.keras


def check_close(found: Any, expected: Any) -> None:
    found = _plain(found)
    tf.nest.assert_same_structure(found, expected)
    for one, other in zip(
        tf.nest.flatten(found), tf.nest.flatten(expected), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)


def _plain(outputs: Any) -> Any:
    return dict(outputs) if hasattr(outputs, "keys") else outputs


def check(folder: pathlib.Path) -> None:
    inputs, targets, outputs = pickle.loads((folder / "expected").read_bytes())
    tensors = tf.nest.map_structure(tf.constant, inputs)
    path = str(folder / "model")
    loaded = tf.saved_model.load(path)
    check_close(loaded(tensors), outputs)
    check_close(loaded(tensors, training=False), outputs)
    signature = loaded.signatures["serving_default"]
    names = sorted(signature.structured_input_signature[1])
    flat = tf.nest.flatten(tensors)
    given = tensors if isinstance(tensors, dict) else dict(zip(names, flat))
    if set(given) >= set(names):
        found = signature(**{name: given[name] for name in names})
        check_close(
            sorted(float(tf.reduce_sum(each)) for each in found.values()),
            sorted(float(np.sum(each)) for each in tf.nest.flatten(outputs)),
        )
    # Last, as it moves the statistics of BatchNormalization.
    tf.nest.assert_same_structure(_plain(loaded(tensors, training=True)), outputs)
    model = K.models.load_model(path)
    assert not [base for base in type(model).__mro__ if "smp" in base.__module__]
    check_close(model(tensors), outputs)
    if targets is None:
        model.compile("sgd", _sum)
        targets = tf.nest.map_structure(np.zeros_like, outputs)
    before = [value.copy() for value in model.get_weights()]
    model.fit(inputs, targets, verbose=0)
    changed = [
        not np.array_equal(*pair) for pair in zip(before, model.get_weights())
    ]
    assert any(changed)
    print(folder.name, "ok", type(model).__name__, len(before), flush=True)


def _sum(y_true: Any, y_pred: Any) -> Any:
    return tf.reduce_mean(tf.cast(y_pred, tf.float32) ** 2)


for argument in sys.argv[1:]:
    check(pathlib.Path(argument))
