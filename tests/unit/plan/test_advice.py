"""What a user is told about a model that cannot be balanced."""

import pytest

from smp_tf.config import resolve
from smp_tf.plan.advice import advise_on_atoms
from smp_tf.plan.cost import Cost
from smp_tf.plan.plan_step import plan_step
from smp_tf.plan.problem import Problem
from tests.unit.plan.example_graphs import (
    SQUARE,
    Builder,
    analyse,
    chain,
    tied,
    uncrossable,
)


def advice(graph, partitions, **config):
    config = {"partitions": partitions, "microbatches": 2, **config}
    return plan_step(graph, resolve(config, partitions), {}, {}).advice


def with_one_large_layer(rows=100):
    b = Builder()
    x = b.argument("x")
    for i in range(4):
        shape = (rows, SQUARE[1]) if i == 2 else SQUARE
        x, _ = b.dense(f"dense_{i}", x, b.variable(f"w{i}", shape))
    b.returns.append(x)
    return b.build()


@pytest.mark.parametrize("partitions", [2, 4, 8])
def test_a_balanced_model_needs_none(partitions):
    assert advice(chain(16), partitions) == ()


def test_one_large_layer_is_named_with_the_remedy():
    (text,) = advice(with_one_large_layer(), 2, memory_weight=1.0)
    assert "layers=['model/dense_2']" in text
    assert "has 81% of the bytes" in text and "1.6 times an even share" in text
    assert "several smaller layers, or use fewer partitions" in text
    assert advice(with_one_large_layer(), 1) == ()


def test_what_is_too_much_depends_on_the_partitions():
    """2 of 5 weights: fine for two ranks and three, too much for one of four."""
    graph = with_one_large_layer(rows=2 * SQUARE[0])
    loads = {p: len(advice(graph, p, memory_weight=1.0)) for p in (2, 3, 4)}
    assert loads == {2: 0, 3: 0, 4: 1}


def test_layers_that_share_a_variable_are_named_with_it():
    (text,) = advice(tied(), 2)
    assert "layers=['model/embed', 'model']" in text
    assert "use the same variables=['embedding:0']; give them variables of" in text


def test_layers_joined_by_what_cannot_be_sent():
    step = analyse(uncrossable())
    problem = Problem((9, 1), (0, 0), (0.0, 0.0), (), (), (1, 1), memory_weight=1.0)
    parts = step.graph, step.roles, step.atoms, [Cost(), Cost()]
    (text,) = advise_on_atoms(*parts, problem)
    assert "layers=['m/a', 'm/b']" in text and "cannot be sent" in text
