"""The ops in graphs: what is refused at load and at build, and a walk over two ranks.

Run as a script, this file is one rank of the walk; see `test_two_ranks`.
"""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import tensorflow as tf

from smp_tf.errors import TransportError
from smp_tf.transport import ops
from smp_tf.transport.engine import Engine

ANY = tf.TensorShape([None, 3])


@pytest.fixture
def library(tmp_path, monkeypatch):
    """Path of a library that `load` would find, not there yet."""
    path = tmp_path / "_smp_kernels.so"
    monkeypatch.setattr(ops, "library_path", lambda: path)
    ops._load.cache_clear()
    yield path
    ops._load.cache_clear()


def test_missing_library_names_the_remedy(library):
    with pytest.raises(TransportError, match="not built; path=.*make setup.*pip"):
        ops.load()


def test_empty_library_counts_as_missing(library):
    library.touch()
    with pytest.raises(TransportError, match="not built"):
        ops.load()


def test_library_for_another_tensorflow_is_not_loaded(library):
    library.write_bytes(b"\x7fELF smp_tf kernels: tensorflow=1.15.0 ucx=1.22; more")
    with pytest.raises(TransportError, match="built_for='1.15.0' installed='2"):
        ops.load()


def test_broken_library_names_the_remedy(library):
    text = f"\x7fELF smp_tf kernels: tensorflow={tf.__version__} ucx=1.22; more"
    library.write_bytes(text.encode())
    with pytest.raises(TransportError, match="do not load: .*make setup"):
        ops.load()


def test_load_is_done_once():
    assert ops.load() is ops.load()


def test_shape_of_the_result_is_the_static_shape():
    graph = tf.Graph()
    with graph.as_default():
        tensor = ops.recv_wait(tf.int32, ANY, peer=1, channel=1, label="x")
    assert tensor.shape.as_list() == [None, 3]
    assert tensor.dtype == tf.int32


def test_without_a_job_the_ops_say_so():
    with pytest.raises(tf.errors.FailedPreconditionError, match=r"smp_tf\.init\(\)"):
        ops.send_post(tf.ones([2]), peer=1, channel=1, shape=[2], label="x")


def test_tensors_that_are_not_plain_bytes_are_refused():
    with pytest.raises(tf.errors.InvalidArgumentError, match="plain bytes.*label=x"):
        items = tf.raw_ops.EmptyTensorList(
            element_shape=[1], max_num_elements=1, element_dtype=tf.float32
        )
        ops.send_post(items, peer=1, channel=1, shape=[], label="x")


def test_channels_have_28_bits():
    with pytest.raises(tf.errors.InvalidArgumentError, match="channel=268435456"):
        ops.send_post(tf.ones([2]), peer=1, channel=1 << 28, shape=[2], label="x")


@pytest.mark.timeout(100)
def test_two_ranks(tmp_path):
    command = [sys.executable, __file__, str(tmp_path)]
    paths = os.pathsep.join(path for path in sys.path if path)
    ranks = [
        subprocess.Popen(
            [*command, str(rank)],
            env={**os.environ, "PYTHONPATH": paths, "TF_CPP_MIN_LOG_LEVEL": "3"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        outputs = [rank.communicate(timeout=90)[0] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)


# ---- one rank of test_two_ranks ----


def join(rank, folder):
    """Connect the two ranks through files."""
    engine = Engine(ops.load())
    address = engine.open(
        rank=rank, size=2, timeout_s=2, job_id="test_ops", net_devices="lo"
    )
    (folder / f"{rank}.new").write_bytes(address)
    (folder / f"{rank}.new").rename(folder / f"{rank}")
    other = folder / f"{1 - rank}"
    while not other.exists():
        time.sleep(0.01)
    engine.connect(1 - rank, other.read_bytes())
    engine.start()
    return engine


@tf.function
def exchange(value, shape, channel, rank):
    """Send `value` and receive the other rank's, posts first."""
    route = {"peer": 1 - rank, "channel": channel, "label": "value"}
    post = ops.recv_post(value.dtype, shape, **route)
    with tf.control_dependencies([post]):
        sent = ops.send_post(value, shape=shape, **route)
    with tf.control_dependencies([sent]):
        other = ops.recv_wait(value.dtype, shape, **route)
    with tf.control_dependencies([other, ops.send_flush()]):
        return tf.identity(other)


def expect(error, text, shape, channel, dtype=tf.float32):
    """Receive from the other rank, which must fail."""
    started = time.monotonic()
    route = {"peer": 1, "channel": channel, "label": "thing"}
    with pytest.raises(error, match=text) as raised:
        tf.function(lambda: ops.recv_wait(dtype, shape, **route))()
    assert f"of thing from rank 1, channel {channel}, step" in str(raised.value)
    return time.monotonic() - started


def values_arrive(rank):
    """All kinds of types and sizes, static and dynamic, several times each."""
    for dtype in (tf.float32, tf.bfloat16, tf.int64, tf.bool, tf.complex64):
        for shape in (tf.TensorShape([4, 3]), ANY, tf.TensorShape(None)):
            value = tf.cast(tf.reshape(tf.range(12) + rank, [4, 3]) % 5, dtype)
            for _ in range(2):
                other = exchange(value, shape, dtype.as_datatype_enum, rank)
                expected = tf.reshape(tf.range(12) + 1 - rank, [4, 3]) % 5
                tf.debugging.assert_equal(other, tf.cast(expected, dtype))
    for size in (0, 1 << 20):
        value = tf.fill([size, 3], float(rank))
        assert exchange(value, value.shape, 50, rank).shape == value.shape


def cancel_a_wait(channel, shape):
    """A step that is cancelled ends its wait."""
    from tensorflow.python.eager import cancellation

    route = {"peer": 1, "channel": channel, "label": "thing"}
    wait = tf.function(lambda: ops.recv_wait(tf.float32, shape, **route))
    manager = cancellation.CancellationManager()
    call = manager.get_cancelable_function(wait.get_concrete_function())
    threading.Timer(0.2, manager.start_cancel).start()
    started = time.monotonic()
    with pytest.raises(tf.errors.CancelledError):
        call()
    assert time.monotonic() - started < 1.5


def main(folder, rank):
    """One rank: what works, then what fails."""
    engine = join(rank, folder)
    values_arrive(rank)
    if rank == 1:
        route = {"peer": 0, "label": "thing"}
        ops.send_post(tf.ones([5]), channel=60, shape=[5], **route)
        ops.send_post(tf.ones([5]), channel=61, shape=tf.TensorShape(None), **route)
        ops.send_post(tf.ones([2, 3]), channel=62, shape=ANY, **route)
        with pytest.raises(tf.errors.InvalidArgumentError, match="agreed="):
            ops.send_post(tf.ones([5]), channel=63, shape=[4], **route)
        with pytest.raises(tf.errors.UnavailableError, match="rank 0 failed: Oops"):
            # Longer than the deadline of one wait.
            for _ in range(10):
                try:
                    ops.recv_wait(tf.int8, [1], peer=0, channel=70, label="never")
                except tf.errors.DeadlineExceededError:
                    pass
    else:
        sizes = "sent_bytes=20 expected_bytes=16"
        shapes = r"sent=float\[5\] expected=float\[\?,3\]"
        types = "sent=float.* expected=int32"
        expect(tf.errors.DataLossError, sizes, [4], 60)
        expect(tf.errors.DataLossError, shapes, ANY, 61)
        expect(tf.errors.DataLossError, types, ANY, 62, tf.int32)
        cancel_a_wait(64, tf.TensorShape([4]))
        cancel_a_wait(65, ANY)
        deadline = tf.errors.DeadlineExceededError
        assert 1.9 < expect(deadline, "timeout_s=2 s", [4], 66) < 4
        assert 1.9 < expect(deadline, "timeout_s=2 s", ANY, 67) < 4
        engine.abort("Oops")
        expect(tf.errors.UnavailableError, "rank 0 failed: Oops", [4], 68)
    assert engine.failure() == "rank 0 failed: Oops"
    engine.close(5)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
