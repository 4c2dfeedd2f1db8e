"""Which segments TensorFlow's choice between implementations must leave alone."""

from collections.abc import Iterator
from typing import Any

import pytest
import tensorflow as tf
from tensorflow.core.protobuf import config_pb2, rewriter_config_pb2

import smp_tf as smp
from smp_tf.runtime.implementations import SELECTOR, unwanted_optimizers

OFF = rewriter_config_pb2.RewriterConfig.OFF
layers = tf.keras.layers


def graph_of(layer: Any, trains: bool) -> Any:
    layer.build((None, 5, 3))

    @tf.function
    def run(x: tf.Tensor) -> Any:
        if not trains:
            return layer(x)
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(layer(x) ** 2)
        return tape.gradient(loss, layer.trainable_variables)

    return run.get_concrete_function(tf.TensorSpec([2, 5, 3])).graph


@pytest.mark.parametrize("kind", ["LSTM", "GRU"])
def test_what_hands_over_from_forward_to_backward(kind: str) -> None:
    make = getattr(layers, kind)
    assert unwanted_optimizers(graph_of(make(4), trains=True)) == (SELECTOR,)
    inside = layers.Bidirectional(make(4))
    assert unwanted_optimizers(graph_of(inside, trains=True)) == (SELECTOR,)
    assert unwanted_optimizers(graph_of(make(4), trains=False)) == ()


def test_others() -> None:
    assert unwanted_optimizers(graph_of(layers.Dense(4), trains=True)) == ()
    simple = layers.SimpleRNN(4)  # has one implementation
    assert unwanted_optimizers(graph_of(simple, trains=True)) == ()


class Reader(smp.DistributedModel):
    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = layers.LSTM(4), layers.Dense(1)

    def call(self, x: tf.Tensor) -> tf.Tensor:
        return self.head(self.lstm(x))


def selector_in(train: Any, x: tf.Tensor) -> set[int]:
    """What the calls of functions say of the optimizer, wherever they are."""
    graph_def = train.get_concrete_function(x).graph.as_graph_def()
    found = set()
    nodes = list(graph_def.node)
    nodes += [node for each in graph_def.library.function for node in each.node_def]
    for node in nodes:
        if "config_proto" in node.attr:
            config = config_pb2.ConfigProto.FromString(node.attr["config_proto"].s)
            found.add(getattr(config.graph_options.rewrite_options, SELECTOR))
    return found


@pytest.fixture
def session() -> Iterator[None]:
    smp.init({"partitions": 1, "microbatches": 2})
    yield
    smp.shutdown()


@pytest.mark.usefixtures("session")
def test_a_step_keeps_what_was_traced() -> None:
    model = Reader()

    @smp.step
    def forward_backward(x: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(x) ** 2)
        return tape.gradient(loss, model.trainable_variables)

    @smp.step
    def evaluate(x: tf.Tensor) -> tf.Tensor:
        return model(x)

    trains = tf.function(lambda x: [g.accumulate() for g in forward_backward(x)])
    reads = tf.function(lambda x: evaluate(x).merge())
    x = tf.ones([4, 5, 3])
    trains(x), reads(x)
    assert OFF in selector_in(trains, x)
    assert OFF not in selector_in(reads, x)
