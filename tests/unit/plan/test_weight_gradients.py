"""What of a backward can wait: found by reachability, and never waited for."""

import pytest

from smp_tf.plan.pipeline import Kind
from tests.unit.plan.example_graphs import (
    Builder,
    analyse,
    chain,
    residual,
    tied,
    used_twice,
    visits,
)
from tests.unit.plan.test_segment import any_cut


def of_kind(plan, kind):
    """Nodes of all segments of a kind."""
    return {name for s in plan.segments if s.kind is kind for name in s.nodes}


@pytest.mark.parametrize("n", [2, 3, 4])
def test_each_rank_but_the_first_can_put_off_its_weight_gradients(n):
    plan = analyse(chain(2 * n)).cut([i // 2 for i in range(2 * n)], None, True)
    middle = " ".join(f"I{i} W{i}" for i in reversed(range(1, n)))
    forward = " ".join(f"F{i}" for i in range(n))
    assert visits(plan) == f"{forward} {middle} B0"
    products = {f"grad/dense_{i}/dw" for i in range(2, 2 * n)}
    assert {name for name in of_kind(plan, Kind.W) if name in products} == products
    assert not of_kind(plan, Kind.I) & products
    # What is put off needs the part before it, and nobody needs it.
    for segment in plan.segments:
        if segment.kind is Kind.W:
            assert segment.stage - 1 in segment.needs
        for need in segment.needs:
            assert plan.segments[need].kind is not Kind.W


def test_one_partition_is_not_split():
    assert visits(analyse(chain(3)).cut([0, 0, 0], None, True)) == "F0 B0"


def test_a_rank_that_is_visited_again_has_two_parts_for_each_visit():
    assert visits(analyse(tied()).cut([0, 1], None, True)).startswith("F0 F1 F0 I0")
    plan = analyse(used_twice()).cut([1, 0], None, True)
    assert visits(plan) == "F1 F0 F1"  # forward only: nothing to put off


def with_bias(sum_shape, returns_more=False):
    """Two layers; the second one also has a bias, whose gradient is a sum."""
    b = Builder()
    x, first = b.dense("a", b.argument("x"), b.variable("w0"))
    w1, bias = b.variable("w1"), b.variable("bias", shape=(4,))
    y, second = b.dense("b", x, w1)
    read = b.read("b/bias/read", bias, shape=(4,), layer="model/b")
    y = b.op("b/biased", "BiasAdd", y, read, layer="model/b")
    _, grad = b.mean_loss(y)
    dx, dw = b.dense_backward(second, grad)
    summed = b.backward("grad/bias", "Sum", grad, forward=y, shape=sum_shape)
    b.gradient(dw, 1)
    b.gradient(summed, 2)
    if returns_more:
        b.returns.append(b.backward("norm", "L2Loss", dw, forward=y, shape=()))
    b.gradient(b.dense_backward(first, dx, needs_input=False)[1], 0)
    return b.build()


def test_cheap_sums_stay_where_they_leave_less_to_hold():
    step = analyse(with_bias((4,)))
    assert "grad/bias" in of_kind(step.cut([0, 1], None, True), Kind.I)
    step = analyse(with_bias((64, 4)))  # larger than what it is made from
    assert "grad/bias" in of_kind(step.cut([0, 1], None, True), Kind.W)


def test_what_is_returned_to_all_ranks_is_awaited():
    plan = analyse(with_bias((64, 4), returns_more=True)).cut([0, 1], None, True)
    assert {"norm", "grad/b/dw"} <= of_kind(plan, Kind.I)
    assert "grad/bias" in of_kind(plan, Kind.W)


@pytest.mark.parametrize("seed", range(60))
def test_nobody_waits_for_what_is_put_off(seed):
    step, plan = any_cut(seed, split_backward=True)
    whole = any_cut(seed)[1]
    deferred = {s.stage for s in plan.segments if s.kind is Kind.W}
    for segment in plan.segments:
        for need in segment.needs:
            if need in deferred:
                # A sum of tied gradients, say, which is nobody else's business.
                assert segment.kind.is_backward and segment.kind is not Kind.I
                assert plan.segments[need].partition == segment.partition
                assert not any(cut.stage == segment.stage for cut in plan.cuts)
    assert not any(cut.stage in deferred for cut in plan.cuts)
    # Cutting in two moves nothing to another rank and sends nothing else.
    assert {(c.tensor, c.source, c.peer) for c in plan.cuts} == {
        (c.tensor, c.source, c.peer) for c in whole.cuts
    }
    for segment in plan.segments:
        if segment.kind is Kind.I:
            rest = plan.segments[segment.stage + 1]
            assert (rest.kind, rest.partition) == (Kind.W, segment.partition)


def test_residual_sums_are_awaited():
    step = analyse(residual(6))
    half = len(step.atoms.atoms) // 2
    plan = step.cut([i // half for i in range(2 * half)], None, True)
    assert {"grad/sum_5", "grad/sum_4"} <= of_kind(plan, Kind.I)
    (weights,) = (s for s in plan.segments if s.kind is Kind.W)
    assert all("dw" in tensor for tensor in weights.outputs)
