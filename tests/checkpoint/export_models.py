"""Models that are exported: what each is called with, how it is built and trained."""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import tensorflow as tf

import smp_tf as smp

K = tf.keras


@dataclasses.dataclass(frozen=True)
class Case:
    """
    Attributes:
        inputs: what the model is called with.
        targets: None for a model that is not compiled; it trains on its outputs.
    """

    build: Callable[[], Any]
    inputs: Any
    targets: Any = None


def _numbers(*shape: int) -> np.ndarray:
    return np.random.RandomState(sum(shape)).rand(*shape).astype(np.float32)


def subclassed() -> Any:
    """Two inputs and outputs by name; state, loops, branches, other dtypes."""

    class Net(smp.DistributedModel):
        def __init__(self) -> None:
            super().__init__(name="net")
            self.own = self.add_weight("own", [4, 4], initializer="glorot_uniform")
            self.embedding = K.layers.Embedding(10, 4)
            self.cells = K.layers.GRU(3)
            self.norm = K.layers.BatchNormalization()
            self.drop = K.layers.Dropout(0.5)
            self.half = K.layers.Dense(4, "relu", dtype="mixed_float16")
            self.last = K.layers.Dense(2, kernel_regularizer="l2")

        def call(self, inputs: Any, training: bool | None = None) -> Any:
            y = inputs["x"] @ self.own
            if tf.reduce_sum(y) > 0.0:
                y = 2 * y
            total = tf.zeros_like(y)
            for i in tf.range(3):
                total += y * tf.cast(i, y.dtype)
            y = self.norm(total, training=training)
            y = self.last(self.drop(self.half(y), training=training))
            return {"y": y, "state": self.cells(self.embedding(inputs["ids"]))}

    return Net()


def functional() -> Any:
    """Two inputs and outputs in lists, a model inside; compiled."""
    one, other = K.Input([4], name="one"), K.Input([4], name="other")
    shared = K.Sequential([K.layers.Dense(5, "relu"), K.layers.BatchNormalization()])
    both = K.layers.Add()([shared(one), shared(other)])
    outputs = [K.layers.Dense(2, name="a")(both), K.layers.Dense(1, name="b")(both)]
    model = smp.distribute(K.Model([one, other], outputs, name="two"))
    model.compile("adam", ["mse", "mae"], metrics=[["mae"], []])
    return model


def sequential() -> Any:
    layers = [K.layers.Dense(8, "tanh"), K.layers.Dropout(0.3), K.layers.Dense(3)]
    model = smp.distribute(K.Sequential(layers, name="row"))
    model.compile(K.optimizers.SGD(0.1, momentum=0.9), "mse")
    return model


def application() -> Any:
    return smp.distribute(
        K.applications.VGG16(
            include_top=False, weights=None, input_shape=[32, 32, 3], pooling="avg"
        )
    )


def hugging_face() -> Any:
    from transformers import BertConfig, TFBertForSequenceClassification

    config = BertConfig(
        vocab_size=50,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=16,
    )
    return smp.distribute(TFBertForSequenceClassification(config))


_IDS = np.random.RandomState(0).randint(0, 10, [4, 5]).astype(np.int32)

CASES = {
    "subclassed": Case(subclassed, {"x": _numbers(4, 4), "ids": _IDS}),
    "functional": Case(
        functional,
        [_numbers(4, 4), _numbers(4, 4) + 1],
        [_numbers(4, 2), _numbers(4, 1)],
    ),
    "sequential": Case(sequential, _numbers(4, 6), _numbers(4, 3)),
    "application": Case(application, _numbers(4, 32, 32, 3)),
    "hugging_face": Case(
        hugging_face,
        {
            "input_ids": _IDS,
            "attention_mask": np.ones_like(_IDS),
            "token_type_ids": _IDS % 2,
        },
    ),
}


def outputs_of(model: Any, inputs: Any, training: bool = False) -> Any:
    """The outputs for the batch, of all partitions."""
    found = smp.step(lambda x: _plain(model(x, training=training)))(inputs)
    return tf.nest.map_structure(lambda output: output.merge(), found)


def train(model: Any, case: Case) -> None:
    """Other values everywhere, also in the statistics of BatchNormalization."""
    if case.targets is not None:
        model.fit(case.inputs, case.targets, batch_size=4, verbose=0)
        return

    def gradients_of(x: Any) -> Any:
        with tf.GradientTape() as tape:
            parts = tf.nest.flatten(_plain(model(x, training=True)))
            total = tf.add_n([tf.reduce_sum(part**2) for part in parts])
        return tape.gradient(total, model.trainable_variables)

    gradients = smp.step(gradients_of)(case.inputs)
    for gradient, variable in zip(gradients, model.trainable_variables, strict=True):
        if gradient is not None:
            variable.assign_sub(0.01 * tf.convert_to_tensor(gradient.reduce_mean()))


def _plain(outputs: Any) -> Any:
    """A dictionary as dictionaries are, of a Hugging Face output."""
    return dict(outputs) if isinstance(outputs, dict) else outputs
