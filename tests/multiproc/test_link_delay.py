"""A link that is 100 ms late: the same results, later."""

import pathlib
import time
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from smp_tf.transport import events
from tests import slow_link
from tests.models import CASES, mlp, tape_step
from tests.ranks import run_ranks

MILLISECONDS = 100.0
M = 4


def train(library: pathlib.Path) -> Any:
    """Gradients and loss of a step on this rank; seconds of a later call; the longest
    wait and the shortest time that a send was under way, in seconds."""
    slow_link.use(library)
    smp.init({"partitions": 2, "microbatches": M})
    tf.keras.utils.set_random_seed(3)
    model = mlp(smp.DistributedModel)
    step = smp.step(tape_step(model))
    x, y = CASES["mlp"].data(2 * M)

    def call() -> Any:
        gradients, loss, _ = step(x, y)
        return [g.accumulate().numpy() for g in gradients], loss.reduce_mean().numpy()

    results = call()
    start = time.monotonic()
    call()
    seconds = time.monotonic() - start
    moved = [event for event in events.last() if event.bytes]
    lasted = sorted((event.end_ns - event.start_ns) / 1e9 for event in moved)
    smp.shutdown()
    return results, seconds, lasted


@pytest.mark.timeout(400)
def test_late_messages_carry_the_same_values() -> None:
    library = slow_link.build()
    late, early = (
        run_ranks(2, train, library, timeout=90, env=slow_link.delay(milliseconds))
        for milliseconds in (MILLISECONDS, 0.0)
    )
    for (results, _, _), (expected, _, _) in zip(late, early, strict=True):
        tf.nest.map_structure(np.testing.assert_array_equal, results, expected)
    # A microbatch goes there and comes back.
    assert max(seconds for _, seconds, _ in late) > 2 * MILLISECONDS / 1e3
    assert max(seconds for _, seconds, _ in early) < MILLISECONDS / 1e3
    # Together: one after the other, the M messages of one way would take M delays.
    assert max(seconds for _, seconds, _ in late) < 2 * M * MILLISECONDS / 1e3
    for _, _, lasted in late:
        assert lasted[-1] > 0.9 * MILLISECONDS / 1e3


def measure(library: pathlib.Path) -> Any:
    """What two ranks plan with after they have measured themselves and the link."""
    slow_link.use(library)
    smp.init({"partitions": 2, "microbatches": M, "profile": True})
    model = mlp(smp.DistributedModel)
    step = smp.step(tape_step(model))
    x, y = CASES["mlp"].data(2 * M)
    plan, again = step.plan(x, y), step.plan(x[:M], y[:M])
    found = plan.profile.links, again.profile.links, str(plan.schedule)
    smp.shutdown()
    return found


@pytest.mark.timeout(400)
def test_ranks_plan_with_the_link_as_it_is() -> None:
    library = slow_link.build()
    for milliseconds in (0.0, MILLISECONDS):
        first, second = run_ranks(
            2, measure, library, timeout=90, env=slow_link.delay(milliseconds)
        )
        assert first == second
        links, again, _ = first
        assert links == again and set(links) == {(0, 1), (1, 0)}
        least = milliseconds / 1e3
        for link in links.values():
            assert least < link.latency_seconds < least + MILLISECONDS / 2e3
