"""Which returned leaf is a tensor, which the gradient of a variable."""

import collections
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.frontend.returns import Returns
from smp_tf.frontend.trace import trace_step
from tests.unit.one_process import session

Pair = collections.namedtuple("Pair", "first second")


@pytest.fixture(autouse=True)
def one_process() -> Iterator[None]:
    with session():
        yield


class Model(smp.DistributedModel):
    """Two layers in the result, one beside it, an embedding."""

    def __init__(self) -> None:
        super().__init__(name="model")
        self.embed = tf.keras.layers.Embedding(6, 4, name="embed")
        self.dense = tf.keras.layers.Dense(4, name="dense")
        self.unused = tf.keras.layers.Dense(4, name="unused")

    def call(self, tokens: tf.Tensor) -> Any:
        x = self.dense(self.embed(tokens))
        return x, self.unused(x)


Post = Callable[[list[Any], list[Any], tf.Tensor], Any]


def returns_of(post: Post) -> tuple[Returns, list[tf.Variable]]:
    """``post(gradients, variables, loss)`` is what the step returns."""
    model = Model()

    def step(tokens: tf.Tensor) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(model(tokens)[0] ** 2)
        variables = model.trainable_variables
        return post(tape.gradient(loss, variables), variables, loss)

    spec = tf.TensorSpec([2, 3], tf.int32)
    found = trace_step(step, [spec], lambda f, given: f(*given))
    return found.returns, model.trainable_variables


def variables_of(returns: Returns) -> list[str | None]:
    return [
        None if leaf.variable is None else leaf.variable.name.removeprefix("model/")
        for leaf in returns.leaves
    ]


EVERY = [
    "embed/embeddings:0",
    "dense/kernel:0",
    "dense/bias:0",
    "unused/kernel:0",
    "unused/bias:0",
]


def test_a_list_of_gradients_with_none_among_them() -> None:
    returns, variables = returns_of(lambda gradients, _, loss: (gradients, loss))
    assert variables_of(returns) == [*EVERY, None]
    assert [leaf.variable is v for leaf, v in zip(returns.leaves, variables)] == (
        [True] * 5
    )
    # a sparse gradient has values, indices and a shape; a missing one has nothing
    assert [len(leaf.components) for leaf in returns.leaves] == [3, 1, 1, 0, 0, 1]
    positions = [c for leaf in returns.leaves for c in leaf.components]
    assert positions == list(range(6))


@pytest.mark.parametrize(
    "change",
    [
        lambda g: tf.clip_by_norm(g, 1.0),
        lambda g: g * 0.5,
        lambda g: tf.cast(tf.cast(g, tf.float16), tf.float32),
        lambda g: tf.where(tf.math.is_finite(g), g, tf.zeros_like(g)),
        tf.identity,
    ],
    ids=["clip_by_norm", "scale", "cast", "where", "identity"],
)
def test_a_gradient_that_was_changed_keeps_its_variable(change: Any) -> None:
    def post(gradients: Any, variables: Any, loss: Any) -> Any:
        dense = [None if g is None else tf.convert_to_tensor(g) for g in gradients]
        return [None if g is None else change(g) for g in dense]

    assert variables_of(returns_of(post)[0]) == EVERY


def test_clip_by_global_norm_keeps_the_variables_and_the_norm_has_none() -> None:
    def post(gradients: Any, variables: Any, loss: Any) -> Any:
        return tf.clip_by_global_norm(gradients, 1.0)

    assert variables_of(returns_of(post)[0]) == [*EVERY, None]


def test_weight_decay_added_to_a_gradient_keeps_the_variable() -> None:
    def post(gradients: Any, variables: Any, loss: Any) -> Any:
        return [g + 0.01 * v for g, v in zip(gradients[1:3], variables[1:3])]

    assert variables_of(returns_of(post)[0]) == EVERY[1:3]


def test_dicts_pairs_and_named_tuples() -> None:
    def post(gradients: Any, variables: Any, loss: Any) -> Any:
        return {
            "by_name": {v.name: g for v, g in zip(variables, gradients)},
            "pair": Pair(gradients[1], loss),
            "nested": [(gradients[2], "text"), 7],
            "default": collections.defaultdict(list, {"z": loss, "a": gradients[1]}),
            "user": collections.UserDict(loss=loss),
        }

    returns, _ = returns_of(post)
    by_name = returns.structure["by_name"]
    for name, leaf in by_name.items():
        if leaf.components:
            assert leaf.variable.name == name
    assert returns.structure["pair"].first.variable.name == "model/dense/kernel:0"
    assert returns.structure["pair"].second.variable is None
    assert type(returns.structure["pair"]) is Pair
    default, user = returns.structure["default"], returns.structure["user"]
    assert type(default) is collections.defaultdict and list(default) == ["z", "a"]
    assert default.default_factory is list
    assert type(user) is collections.UserDict and user["loss"].components
    ((gradient, text), number) = returns.structure["nested"]
    assert gradient.variable.name == "model/dense/bias:0"
    assert (text.value, number.value) == ("text", 7) and not text.components


def test_losses_outputs_and_what_mixes_gradients_have_no_variable() -> None:
    def post(gradients: Any, variables: Any, loss: Any) -> Any:
        dense = [tf.convert_to_tensor(g) for g in gradients[:3]]
        return [
            loss * 2.0,
            tf.linalg.global_norm(dense),
            tf.norm(dense[1]),
            dense[0] @ dense[1],
            variables[1] * 1.0,
            tf.constant(1.0),
        ]

    assert variables_of(returns_of(post)[0]) == [None] * 6


def test_lists_that_only_look_like_the_gradients_are_left_alone() -> None:
    def post(gradients: Any, variables: Any, loss: Any) -> Any:
        return [loss, None, None, None, None]

    assert variables_of(returns_of(post)[0]) == [None] * 5


def test_the_same_gradient_returned_twice() -> None:
    def post(gradients: Any, variables: Any, loss: Any) -> Any:
        return gradients[1:3], {"again": gradients[1]}

    assert variables_of(returns_of(post)[0]) == [*EVERY[1:3], EVERY[1]]
