"""All conformance scripts, by theme."""

from tests.models import differentiation, flow, real, reuse, state

THEMES = {
    "flow": flow.CASES,
    "reuse": reuse.CASES,
    "state": state.CASES,
    "differentiation": differentiation.CASES,
    "applications": real.APPLICATIONS,
    "large_applications": real.LARGE_APPLICATIONS,
    "hugging_face": real.HUGGING_FACE,
}
