"""What a conformance script is: models, a step, and the variables around it."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

layers = tf.keras.layers


@dataclasses.dataclass(frozen=True)
class Script:
    """One user's script, built on plain Keras or on ``smp.DistributedModel``.

    Attributes:
        step: (x, y) -> any structure.
        models: that it trains or only calls.
        gradients: key of the step's result -> the variables its list belongs to; the
            trained ones. Called after the first step, when all variables exist.
        state: variables outside the models, which must be the same on every rank.
    """

    step: Callable[..., Any]
    models: Sequence[Any]
    gradients: Callable[[], Mapping[str, Sequence[tf.Variable]]] = dict
    state: Sequence[tf.Variable] = ()


@dataclasses.dataclass(frozen=True)
class ScriptCase:
    """A script with the data it takes; ``style`` says how it differentiates."""

    name: str
    build: Callable[[type], Script]
    features: Callable[[np.random.RandomState, int], Any]
    labels: Callable[[np.random.RandomState, int], Any]
    style: str = "tape"

    def data(self, batch: int) -> tuple[Any, Any]:
        random = np.random.RandomState(0)
        x = tf.nest.map_structure(tf.constant, self.features(random, batch))
        return x, tf.nest.map_structure(tf.constant, self.labels(random, batch))


@dataclasses.dataclass(frozen=True)
class Job:
    """A script that decorates its steps and calls them itself.

    Attributes:
        main: what it does from the first call on; returns tensors and Python values
            that are the same on every rank.
        models: that it trains or only calls.
        plan: plan of one of its steps, afterwards; for the distributed ones.
        state: variables outside the models, which must be the same on every rank.
    """

    main: Callable[[], Any]
    models: Sequence[Any]
    plan: Callable[[], Any]
    state: Sequence[tf.Variable] = ()


@dataclasses.dataclass(frozen=True)
class JobCase:
    """``build`` takes the base class of its models, and ``smp.step`` or the same in one
    process; ``style`` says how the steps are called or what the optimizer is."""

    name: str
    style: str
    build: Callable[[type, Callable[..., Any]], Job]


def every_variable(model: Any) -> list[tf.Variable]:
    """All variables of a model, whatever the base class."""
    every = getattr(model, "global_variables", None) or model.variables
    return [each for each in every if isinstance(each, tf.Variable)]  # no tables


def trainable(model: Any) -> list[tf.Variable]:
    """All trained variables, past the property that shows a rank its own only."""
    return list(tf.keras.Model.trainable_weights.fget(model))


def vectors(size: int = 8) -> Callable[..., Any]:
    return lambda random, batch: random.rand(batch, size).astype("f")


def tokens(length: int = 5, vocabulary: int = 20) -> Callable[..., Any]:
    return lambda random, batch: random.randint(0, vocabulary, (batch, length))


def classes(count: int = 6) -> Callable[..., Any]:
    return lambda random, batch: random.randint(0, count, batch)


def cross_entropy(labels: tf.Tensor, logits: tf.Tensor) -> tf.Tensor:
    each = tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits)
    return tf.reduce_mean(each)


def stack(base: type, name: str = "stack", out: int = 6, **options: Any) -> Any:
    """Dense layers, enough for 4 partitions."""

    class Stack(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name=name)
            self.parts = [
                layers.Dense(8, activation="tanh", name=f"part_{i}", **options)
                for i in range(3)
            ]
            self.head = layers.Dense(out, name="head", **options)

        def call(self, x: tf.Tensor, training: bool | None = None) -> tf.Tensor:
            for part in self.parts:
                x = part(x)
            return self.head(x)

    return Stack()


def train(model: Any, loss_of: Callable[..., tf.Tensor] = cross_entropy) -> Script:
    """The usual step of one model."""

    def step(x: Any, y: Any) -> Any:
        with tf.GradientTape() as tape:
            outputs = model(x, training=True)
            loss = loss_of(y, outputs)
        gradients = tape.gradient(loss, model.trainable_variables)
        return {"gradients": gradients, "loss": loss, "outputs": outputs}

    return Script(step, [model], lambda: {"gradients": trainable(model)})


def subclass(base: type, init: Callable[[Any], None], call: Callable[..., Any]) -> Any:
    """A model from its two functions."""

    class Model(base):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__(name="model")
            init(self)

        def call(self, x: Any, training: bool | None = None) -> Any:
            return call(self, x, training)

    return Model()
