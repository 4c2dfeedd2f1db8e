"""Rendezvous against Horovod's own store; the ranks are threads."""

import concurrent.futures
import contextlib
import socket
import time
from collections.abc import Callable, Iterator

import pytest
from horovod.runner.http.http_server import RendezvousServer

from smp_tf.errors import TransportError
from smp_tf.transport.rendezvous import Rendezvous, pack, unpack


@pytest.fixture
def port() -> Iterator[int]:
    server = RendezvousServer()
    port = server.start()
    server.init([])
    yield port
    server.stop()
    server._httpd.server_close()


def _rendezvous(
    port: int, rank: int, size: int, epoch: int = 0, timeout_s: float = 10.0
) -> Rendezvous:
    return Rendezvous(
        "127.0.0.1", port, rank=rank, size=size, epoch=epoch, timeout_s=timeout_s
    )


def _in_threads(size: int, call: Callable[[int], object]) -> list[object]:
    """Results of ``call(rank)``, or the exceptions, by rank."""
    with concurrent.futures.ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(call, rank) for rank in range(size)]
        return [future.exception() or future.result() for future in futures]


@pytest.mark.parametrize(
    "values", [[], [b""], [b"", b"a"], [bytes(range(256)) * 40, b"x", b""]]
)
def test_split_is_the_inverse_of_join(values: list[bytes]) -> None:
    assert unpack(pack(values)) == values


@pytest.mark.parametrize("size", [1, 2, 5])
def test_everybody_gets_the_values_of_all_in_order(port: int, size: int) -> None:
    def call(rank: int) -> list[bytes]:
        time.sleep(0.02 * (size - rank))  # the last one first
        return _rendezvous(port, rank, size).exchange("v", b"%d" % rank * 1000)

    expected = [b"%d" % rank * 1000 for rank in range(size)]
    assert _in_threads(size, call) == [expected] * size


def test_names_and_epochs_do_not_mix(port: int) -> None:
    def call(rank: int) -> list[list[bytes]]:
        first = _rendezvous(port, rank, 2, epoch=0)
        second = _rendezvous(port, rank, 2, epoch=1)
        return [
            first.exchange("a", b"0a%d" % rank),
            first.exchange("b", b"0b%d" % rank),
            second.exchange("a", b"1a%d" % rank),
        ]

    expected = [[b"0a0", b"0a1"], [b"0b0", b"0b1"], [b"1a0", b"1a1"]]
    assert _in_threads(2, call) == [expected, expected]


def test_deadline_names_the_missing_ranks_and_the_store(port: int) -> None:
    def call(place: int) -> list[bytes]:
        rank = (0, 2)[place]
        return _rendezvous(port, rank, 4, timeout_s=0.3).exchange("hello", b"")

    started = time.monotonic()
    errors = _in_threads(2, call)
    assert time.monotonic() - started < 3
    for error in errors:
        assert isinstance(error, TransportError)
        assert "1, 3 of 4" in str(error)
        assert f"store=http://127.0.0.1:{port}" in str(error)
        assert "timeout_s=0.3" in str(error)


def test_a_rank_that_gives_up_is_named_at_once(port: int) -> None:
    def call(rank: int) -> list[bytes]:
        if rank == 2:
            return _rendezvous(port, 2, 3).give_up("ValueError: boom")
        return _rendezvous(port, rank, 3).exchange("hello", b"")

    started = time.monotonic()
    errors = _in_threads(3, call)
    assert time.monotonic() - started < 3
    for error in errors[:2]:
        assert isinstance(error, TransportError)
        assert "rank 2 failed: ValueError: boom" in str(error)


def test_only_the_first_failure_is_kept(port: int) -> None:
    _rendezvous(port, 1, 3).give_up("first")
    _rendezvous(port, 2, 3).give_up("second")
    with pytest.raises(TransportError, match="rank 1 failed: first"):
        _rendezvous(port, 0, 3).exchange("hello", b"")


def test_a_store_that_is_gone_is_named() -> None:
    with contextlib.closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.raises(TransportError, match=f"store=http://127.0.0.1:{port}"):
        _rendezvous(port, 0, 2).exchange("hello", b"")
    _rendezvous(port, 0, 2).give_up("no store, no error")


def test_proxies_are_not_asked(port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert _rendezvous(port, 0, 1).exchange("a", b"x") == [b"x"]
