"""``fit`` gives the numbers of plain Keras: whole scripts, on 1, 2 and 3 ranks.

The truth is plain Keras, in one process: with microbatches cut by hand (``plain``),
and, where microbatches change nothing, without them. A table of differences is printed.
"""

import os
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

import smp_tf as smp
from tests.conformance.compare import OPTIONS
from tests.keras.plain import microbatched
from tests.keras.scripts import SCRIPTS, FitScript, Maker, Trained
from tests.ranks import run_ranks

pytestmark = pytest.mark.timeout(900)  # whoever is first waits for all launches

MICROBATCHES = 4
SEED = 11


def weights_of(trained: Trained) -> list[Any]:
    """Of the whole model, on every rank."""
    mine = {
        index: variable.numpy()
        for index, variable in enumerate(trained.model.global_variables)
        if any(variable is local for local in trained.model.variables)
    }
    parts = smp.allgather(mine, smp.MP_GROUP)
    every = {index: value for part in parts for index, value in part.items()}
    return [every[index] for index in range(len(trained.model.global_variables))]


def train_distributed(is_rewritten: bool = True) -> dict[str, Any]:
    """Name of script -> (figures, weights).

    Args:
        is_rewritten: whether TensorFlow may rewrite arithmetic, which it does in
            another way where it sees the updates of fewer weights.
    """
    if not is_rewritten:
        tf.config.optimizer.set_experimental_options(OPTIONS)
    found = {}
    for script in SCRIPTS:
        smp.init({"microbatches": MICROBATCHES})
        tf.keras.utils.set_random_seed(SEED)
        trained = script.run(Maker(smp.DistributedModel, smp.distribute))
        found[script.name] = trained.figures, weights_of(trained)
        smp.shutdown()
        tf.keras.backend.clear_session()
    return found


def train_plain(script: FitScript, count: int) -> tuple[Any, Any]:
    """Plain Keras with ``count`` microbatches in a batch; 0 for Keras's own steps."""
    tf.keras.utils.set_random_seed(SEED)

    class Base(tf.keras.Model):
        def compile(self, *args: Any, **kwargs: Any) -> None:
            super().compile(*args, **kwargs)
            if count:
                microbatched(self, count)

    def wrap(model: Any) -> Any:
        return microbatched(model, count) if count else model

    trained = script.run(Maker(Base, wrap))
    found = trained.figures, [each.numpy() for each in trained.model.variables]
    tf.keras.backend.clear_session()
    return found


def difference(found: Any, expected: Any) -> float:
    """The largest one of two structures, absolute or relative, whichever is less."""
    one, other = tf.nest.flatten(found), tf.nest.flatten(expected)
    assert len(one) == len(other)
    worst = 0.0
    for a, b in zip(one, other, strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert a.shape == b.shape
        worst = max(worst, float(np.max(np.abs(a - b) / (1 + np.abs(b)), initial=0.0)))
    return worst


def work_alone() -> tuple[dict[tuple[str, str], Any], dict[str, Any]]:
    """One of two processes that know nothing of each other: (its half of the truths,
    what all scripts give in a session of one rank).

    In process 0 TensorFlow may rewrite arithmetic in that session, in process 1 not.
    """
    rank = int(os.environ["HOROVOD_RANK"])
    for name in list(os.environ):
        if name.startswith("HOROVOD_"):
            del os.environ[name]
    counts = {"microbatches": MICROBATCHES, "batches": 0}
    truths = {
        (script.name, name): train_plain(script, counts[name])
        for script in SCRIPTS[rank::2]
        for name in script.truths
    }
    return truths, train_distributed(is_rewritten=rank == 0)


@pytest.fixture(scope="module")
def alone() -> list[Any]:
    return run_ranks(2, work_alone, timeout=280)


@pytest.fixture(scope="module")
def on_ranks(alone: list[Any]) -> dict[int, Any]:
    """Number of ranks -> what each of them has."""
    found = {size: run_ranks(size, train_distributed, timeout=280) for size in (2, 3)}
    return {1: [alone[0][1]], **found}


def test_fit_gives_the_numbers_of_plain_keras(
    alone: list[Any], on_ranks: dict[int, Any], capsys: Any
) -> None:
    expected_of = alone[0][0] | alone[1][0]
    lines = [f"{'script':>15} {'ranks':>5} {'truth':>12}  history  weights"]
    failures = []
    for script in SCRIPTS:
        truths = {name: expected_of[script.name, name] for name in script.truths}
        for size, results in on_ranks.items():
            figures, weights = results[0][script.name]
            for name, (expected, expected_weights) in truths.items():
                assert set(figures) == set(expected), script.name
                history = max(difference(figures[k], expected[k]) for k in expected)
                kept = difference(weights, expected_weights)
                line = f"{script.name:>15} {size:>5} {name:>12}"
                lines.append(f"{line}  {history:.1e}  {kept:.1e}")
                if not max(history, kept) <= script.tolerance:
                    failures.append(lines[-1])
    with capsys.disabled():  # also in the log of a run that passes
        print("\n" + "\n".join(lines))
    assert not failures, "\n".join([lines[0], *failures])


def test_all_ranks_have_the_same_figures(on_ranks: dict[int, Any]) -> None:
    for size, results in on_ranks.items():
        for script in SCRIPTS:
            first = results[0][script.name][0]
            for other in results[1:]:
                np.testing.assert_equal(other[script.name][0], first)


def test_the_number_of_ranks_changes_no_bit(alone: list[Any]) -> None:
    one = alone[1][1]
    two = run_ranks(2, train_distributed, False, timeout=180)[0]
    exact = [script.name for script in SCRIPTS if script.name != "sequence"]
    for name in exact:  # a norm over the model is summed by rank
        assert difference(two[name], one[name]) == 0, name
