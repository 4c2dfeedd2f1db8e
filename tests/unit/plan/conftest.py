"""Fixtures of the plan's tests."""

import sys

import pytest

import smp_tf.plan.cost  # noqa: F401  (by name below: smp_tf.plan is a function, too)


@pytest.fixture
def quick_messages(monkeypatch):
    """Messages take no time: the example graphs compute for microseconds, so a real
    message would be all that a step consists of."""
    cost = sys.modules["smp_tf.plan.cost"]
    monkeypatch.setattr(cost, "MESSAGE_SECONDS", 0.0)
    monkeypatch.setattr(cost, "MESSAGE_BYTES_PER_SECOND", float("inf"))
