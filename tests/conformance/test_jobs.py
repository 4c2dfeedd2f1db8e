"""Scripts that call their steps in their own ways equal the same in one process.

The truth is the same script, on plain Keras and with a step that is a ``tf.function``
called once for each microbatch. Compared bit for bit are what the script returns (the
same on every rank) and all variables at its end.
"""

from typing import Any

import pytest
import tensorflow as tf

import smp_tf as smp
from tests.conformance.compare import (
    Ownership,
    record,
    snapshot,
    wrong_values,
    wrong_variables,
)
from tests.conformance.grid import (
    GRIDS,
    LIMIT_SECONDS,
    Config,
    cases_of,
    check_cases,
    write_truths,
)
from tests.conformance.one_process import plain_step
from tests.conformance.table import Row, Table
from tests.conformance.truths import Truths, TruthStore
from tests.models.script import JobCase
from tests.models.scripts import JOBS

LAUNCHES = ["calls+signatures", "several_models+optimizers"]


def truth(case: JobCase, count: int) -> tuple[Any, Any]:
    """(what the script returns, all variables at its end) of plain Keras."""
    tf.keras.utils.set_random_seed(1)
    job = case.build(tf.keras.Model, plain_step(count))
    result = tf.nest.map_structure(record, job.main())
    return result, snapshot(job.models, job.state)


def check(case: JobCase, config: Config, expected: Any) -> tuple[Any, list[str]]:
    """Run one script in the current session: (a step's plan, what is wrong)."""
    values, variables = expected
    if smp.rank() == 0:  # has built one more model: automatic names differ
        case.build(tf.keras.Model, plain_step(config.microbatches))
    tf.keras.utils.set_random_seed(1)
    job, own = case.build(smp.DistributedModel, smp.step), Ownership()
    result = tf.nest.map_structure(record, job.main())
    own.learn(job.models)
    wrong = wrong_values("result", result, values)
    return job.plan(), wrong + wrong_variables(job.models, job.state, variables, own)


def write_themes(themes: str, truths: Truths) -> None:
    write_truths(cases_of(JOBS, themes), GRIDS.values(), truth, truths)


def check_themes(
    themes: str, size: int, grid: list[tuple[int, str]], truths: Truths, only: str = ""
) -> list[Row]:
    return check_cases(cases_of(JOBS, themes, only), size, grid, check, truths)


@pytest.mark.timeout(2 * LIMIT_SECONDS + 20)
@pytest.mark.parametrize("size", list(GRIDS))
@pytest.mark.parametrize("themes", LAUNCHES)
def test_equals_one_process(
    themes: str, size: int, table: Table, store: TruthStore
) -> None:
    truths = store.of(write_themes, themes, LIMIT_SECONDS)
    table.run(size, check_themes, themes, GRIDS[size], truths, timeout=LIMIT_SECONDS)


def test_no_theme_is_left_out() -> None:
    assert {theme for themes in LAUNCHES for theme in themes.split("+")} == set(JOBS)
