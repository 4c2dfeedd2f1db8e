"""Errors: who catches what."""

import pickle

import pytest

from smp_tf import errors


@pytest.mark.parametrize(
    ("name", "builtin"),
    [
        ("NotInitializedError", RuntimeError),
        ("ConfigError", ValueError),
        ("MicrobatchError", ValueError),
        ("TraceError", ValueError),
        ("PartitionError", ValueError),
        ("ScheduleError", ValueError),
        ("TransportError", RuntimeError),
    ],
)
def test_every_error_is_ours_and_a_builtin(name, builtin):
    error = getattr(errors, name)
    assert issubclass(error, errors.SmpError)
    assert issubclass(error, builtin)


def test_all_lists_every_error():
    defined = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert defined == set(errors.__all__)


def test_errors_travel_between_processes():
    error = pickle.loads(pickle.dumps(errors.TransportError("rank 1 died")))
    assert isinstance(error, errors.TransportError)
    assert str(error) == "rank 1 died"
