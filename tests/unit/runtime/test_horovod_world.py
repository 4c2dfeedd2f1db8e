"""What ``horovod: true`` needs, and whose errors name nobody."""

import sys
import types

import pytest
import tensorflow as tf

from smp_tf.errors import ConfigError
from smp_tf.runtime.horovod_world import HorovodWorld, require
from smp_tf.topology import Topology
from smp_tf.transport.messages import Messages


def test_horovod_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", None)
    with pytest.raises(ConfigError, match="`horovod`: needs Horovod .*Install Horovod"):
        require()


def test_horovod_is_initialised_already(monkeypatch):
    hvd = types.SimpleNamespace(is_initialized=lambda: True, size=lambda: 4)
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", hvd)
    with pytest.raises(ConfigError, match="called before smp.init.*hvd.size..=4"):
        require()
    hvd.is_initialized = lambda: False
    assert require() is hvd


def test_errors_of_horovod(monkeypatch):
    hvd = types.SimpleNamespace(is_initialized=lambda: False)
    monkeypatch.setitem(sys.modules, "horovod.tensorflow", hvd)
    messages = Messages(None, Topology(size=4, pp_size=2), 1, "", 1.0)
    explain = HorovodWorld(None, messages, 1.0).explain
    HorovodInternalError = type("HorovodInternalError", (RuntimeError,), {})
    text = "Horovod has been shut down"
    for error in HorovodInternalError(), tf.errors.UnknownError(None, None, text):
        assert "are the ranks 1, 3 of the job" in explain(error)
    assert explain(tf.errors.UnknownError(None, None, "a disk is full")) is None
    assert explain(ValueError("Horovod is what I read about")) is None
