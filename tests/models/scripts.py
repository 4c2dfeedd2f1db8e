"""All conformance scripts, by theme."""

from tests.models import (
    calls,
    differentiation,
    dtypes,
    flow,
    optimizers,
    real,
    reuse,
    several_models,
    signatures,
    state,
)

THEMES = {
    "flow": flow.CASES,
    "reuse": reuse.CASES,
    "state": state.CASES,
    "differentiation": differentiation.CASES,
    "dtypes": dtypes.CASES,
    "applications": real.APPLICATIONS,
    "large_applications": real.LARGE_APPLICATIONS,
    "hugging_face": real.HUGGING_FACE,
}

JOBS = {
    "calls": calls.CASES,
    "signatures": signatures.CASES,
    "several_models": several_models.CASES,
    "optimizers": optimizers.CASES,
}
