"""Replicas update with the means of their gradients: the numbers of plain Keras.

The truth is one optimizer over all variables, given the means; see ``update_cases``.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.data_parallel.sharding import owners
from smp_tf.frontend.hooks.optimizer_slots import every_slot
from smp_tf.keras.updates import apply_gradients
from tests.keras.update_cases import (
    BY_GLOBAL_NORM,
    CLOSE,
    DENSE,
    EXACT,
    SAME,
    SCALED,
    SHAPES,
    Make,
    Run,
    check,
    compare,
    legacy,
    mean_of,
    new,
    plain,
    spoiled,
    unscaled,
)
from tests.ranks import run_ranks

# What partition 0 has, what partition 1 has.
SPLIT = ((0, 1, 4), (2, 3))
IDLE = ((0, 1, 2, 3, 4), ())
ONLY_SPARSE = ((2,), (0, 1, 3, 4))


def start(**config: Any) -> None:
    # Else a graph of some variables may be simplified otherwise than one of all.
    tf.config.optimizer.set_experimental_options({"arithmetic_optimization": False})
    smp.init({"partitions": 2, "horovod": True, "timeout_s": 30, **config})


def distributed(make: Make) -> Make:
    return lambda: smp.DistributedOptimizer(make())


def by_itself(optimizer: Any, gradients: Any, variables: Any, every: Any = ()) -> None:
    """As in a loop of one's own."""
    optimizer.apply_gradients(zip(gradients, variables))


def check_all(
    names: Sequence[str], apply: Any = apply_gradients, layout: Any = SPLIT
) -> list[str]:
    every = {**EXACT, **DENSE, **BY_GLOBAL_NORM}
    wrong = []
    for tolerance, dense, group in (
        (SAME, False, EXACT),
        (SAME, True, DENSE),
        (CLOSE, False, BY_GLOBAL_NORM),
    ):
        cases = {name: every[name] for name in names if name in group}
        wrong += check(
            apply,
            cases,
            layout[smp.pp_rank()],
            tolerance,
            dense,
            smp.dp_rank(),
            smp.dp_size(),
            distributed,
        )
    return wrong


def check_scaled(layout: Any) -> None:
    """The infinity is on one replica, and one partition."""
    for name in ("global", "legacy", "fixed"):
        make, close = SCALED[name]
        mine = Run(distributed(make), layout[smp.pp_rank()], apply_gradients)
        whole = Run(make, range(len(SHAPES)), unscaled)
        for run in (mine, whole):
            run.optimizer.get_scaled_loss(tf.constant(1.0))  # else Keras warns

        @tf.function
        def both(gradients: Any, means: Any) -> None:
            mine.step(gradients)
            whole.step(means)

        scales = []
        for step in range(6):
            scale = float(whole.optimizer.loss_scale)
            last = plain if "fixed" in name else spoiled
            every = [plain(step, scale), last(step, scale)]
            both(every[smp.dp_rank()], mean_of(every))
            found = float(mine.optimizer.loss_scale)
            assert found == float(whole.optimizer.loss_scale), (layout, name, step)
            compare(f"{layout} {name} {step}", mine, whole, close)
            scales.append(found)
        if whole.optimizer.dynamic:
            assert scales == [8.0, 16.0, 16.0, 8.0, 4.0, 4.0], scales


def check_owners() -> None:
    """Each slot is on one rank of the dp_group; variables are the same on all."""
    shapes = [[30, 10], [10], [3, 5], [200], [1]]
    variables = [tf.Variable(tf.zeros(shape)) for shape in shapes]
    optimizer = smp.DistributedOptimizer(tf.keras.optimizers.Adam(0.1))
    optimizer.build(variables)
    found = owners(variables)
    assert found == owners(variables) == [0, 1, 1, 1, 1]
    mine = [shape for shape, owner in zip(shapes, found) if owner == smp.dp_rank()]
    slots = [each.shape.as_list() for each in every_slot(optimizer)]
    assert sorted(slots) == sorted([*mine, *mine]), (slots, mine)
    seed = 7 + smp.dp_rank()
    for _ in range(3):
        gradients = [tf.random.stateless_normal(s, [seed, 1]) for s in shapes]
        optimizer.apply_gradients(zip(gradients, variables))  # eagerly
        values = [variable.numpy().tobytes() for variable in variables]
        assert len(set(map(tuple, smp.allgather(values, smp.DP_GROUP)))) == 1
    assert int(optimizer.iterations) == 3 and np.abs(variables[0]).min() > 0


def check_broadcast() -> None:
    """A script that broadcasts its optimizer's variables mixes up no slots."""
    import horovod.tensorflow as hvd

    def scaled(inner: Any) -> Any:
        return tf.keras.mixed_precision.LossScaleOptimizer(inner)

    makers: list[Make] = [
        lambda: new.SGD(0.1, momentum=0.9),
        lambda: scaled(new.Adam(0.1, use_ema=True)),
        lambda: legacy.SGD(0.1, momentum=0.9),
        lambda: scaled(legacy.Adam(0.1)),
    ]
    for make in makers:
        variables = [tf.Variable([1.0, 1.0]), tf.Variable([2.0, 2.0])]
        optimizer = smp.DistributedOptimizer(make())
        if hasattr(optimizer, "get_scaled_loss"):
            optimizer.get_scaled_loss(tf.constant(1.0))
            optimizer.get_unscaled_gradients([])
        gradients = [tf.constant([1.0, 1.0]), tf.constant([5.0, 5.0])]
        optimizer.apply_gradients(zip(gradients, variables))
        before = [slot.numpy() for slot in every_slot(optimizer)]
        assert before
        common = optimizer.variables() if callable(optimizer.variables) else []
        assert 1 <= len(common) <= 2, [each.name for each in common]
        assert any(each is optimizer.iterations for each in common)
        hvd.broadcast_variables(common, root_rank=0)
        after = [slot.numpy() for slot in every_slot(optimizer)]
        np.testing.assert_array_equal(after, before)


def check_everything() -> None:
    start(shard_optimizer_state=True)
    wrong = check_all([*EXACT, *DENSE, *BY_GLOBAL_NORM])
    wrong += check_all(["momentum", "Nadam", "legacy global"], layout=ONLY_SPARSE)
    check_scaled(SPLIT)
    check_owners()
    check_broadcast()
    smp.shutdown()
    start(placement_strategy="spread")
    wrong += check_all(["Adam", "Nadam", "EMA", "legacy Nadam", "global"])
    wrong += check_all(["momentum", "legacy SGD", "global"], by_itself, IDLE)
    check_scaled(IDLE)
    assert not wrong, "\n".join(wrong)


@pytest.mark.timeout(200)
def test_replicas_update_as_one_process_does_with_the_means() -> None:
    run_ranks(4, check_everything, timeout=190)
