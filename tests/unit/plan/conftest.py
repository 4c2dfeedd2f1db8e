"""Fixtures of the plan's tests."""

import sys

import pytest

from smp_tf.plan.link import Link


@pytest.fixture
def quick_messages(monkeypatch):
    """Messages take no time: the example graphs compute for microseconds, so a real
    message would be all that a step consists of."""
    # By name: smp_tf.plan is a function, too.
    link = sys.modules["smp_tf.plan.link"]
    monkeypatch.setattr(link, "SAME_HOST", Link(0.0, float("inf")))
