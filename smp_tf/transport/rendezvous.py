"""Meeting of all ranks in the launcher's own key-value store.

Under ``horovodrun --gloo`` the launcher runs an HTTP store and tells every rank its
address. Before the transport exists, the ranks exchange byte strings through it: rank 0
gathers one from everybody and publishes the whole, so that N ranks make about 4N
requests and not N * N.

    rank r   PUT smp_tf.<epoch>/<name>.<r>
    rank 0   GET smp_tf.<epoch>/<name>.<0..N-1>, PUT smp_tf.<epoch>/<name>.all
    rank r   GET smp_tf.<epoch>/<name>.all

A rank that has to give up publishes why under ``failed``; everybody else, who would
otherwise wait for it until the deadline, reads that while polling. ``epoch`` counts the
calls of ``init`` in one process, so that a second session never reads what the first
one left.
"""

import contextlib
import http.client
import logging
import math
import struct
import time
from collections.abc import Iterator, Sequence

from smp_tf.errors import TransportError

POLL_SECONDS = (0.002, 0.1)  # first and longest pause between two looks
_REQUEST_SECONDS = 10.0  # one request; the store answers from memory
STALL_SECONDS = 30.0  # waiting longer than this is said once, with names
_FAILED = "failed"

logger = logging.getLogger("smp_tf")


class Rendezvous:
    """One meeting of ``size`` ranks; ``exchange`` may be called any number of times.

    Every rank calls ``exchange`` with the same names in the same order, and waits at
    most ``timeout_s`` seconds in each.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        rank: int,
        size: int,
        epoch: int,
        timeout_s: float,
    ) -> None:
        self._address = (host, port)
        self._rank = rank
        self._size = size
        self._scope = f"smp_tf.{epoch}"
        self._timeout_s = timeout_s

    def exchange(self, name: str, value: bytes) -> list[bytes]:
        """Give ``value`` to all ranks and return theirs, ordered by rank.

        Raises:
            TransportError: a rank did not come before the deadline, or gave up; the
                text names the ranks and the address of the store.
        """
        deadline = time.monotonic() + self._timeout_s
        self._put(f"{name}.{self._rank}", value)
        if self._rank == 0:
            values = [
                self._wait(name, str(rank), deadline) for rank in range(self._size)
            ]
            self._put(f"{name}.all", pack(values))
            return values
        return unpack(self._wait(name, "all", deadline))

    def give_up(self, reason: str) -> str | None:
        """Tell the ranks that wait for this one why it will not come; never raises.

        Returns:
            What another rank has published before, from which this failure follows;
            the later one is then not published. None if this one was the first.
        """
        with contextlib.suppress(TransportError):
            first = self._get(_FAILED)
            if first is not None:
                return first.decode()
            self._put(_FAILED, f"rank {self._rank} failed: {reason}".encode())
        return None

    def _wait(self, name: str, whose: str, deadline: float) -> bytes:
        pause, longest = POLL_SECONDS
        stall = time.monotonic() + STALL_SECONDS
        while (value := self._get(f"{name}.{whose}")) is None:
            failed = self._get(_FAILED)
            if failed is not None:
                raise TransportError(f"{failed.decode()} ({self._place(name)})")
            now = time.monotonic()
            if now > deadline:
                raise TransportError(
                    f"{self._missing(name)} not within timeout_s={self._timeout_s:g} "
                    f"({self._place(name)}). Look at the output of the missing ranks; "
                    f"if they only start slowly, raise timeout_s."
                )
            if now > stall:
                stall = math.inf
                logger.warning(
                    "rank %d still waits: %s (%s)",
                    self._rank,
                    self._missing(name),
                    self._place(name),
                )
            time.sleep(min(pause, max(deadline - now, 0.0)))
            pause = min(2 * pause, longest)
        return value

    def _place(self, name: str) -> str:
        host, port = self._address
        return f"exchange={name}, rank={self._rank}, store=http://{host}:{port}"

    def _missing(self, name: str) -> str:
        absent = [
            rank
            for rank in range(self._size)
            if self._get(f"{name}.{rank}") is None
        ]
        # All values are there and nobody put them together: rank 0 was lost in between.
        return missing_ranks(absent or [0], self._size)

    def _get(self, key: str) -> bytes | None:
        with self._request("GET", key) as response:
            if response.status == http.client.NOT_FOUND:
                return None
            return self._checked(response)

    def _put(self, key: str, value: bytes) -> None:
        with self._request("PUT", key, value) as response:
            self._checked(response)

    @contextlib.contextmanager
    def _request(
        self, method: str, key: str, body: bytes | None = None
    ) -> Iterator[http.client.HTTPResponse]:
        # Not urllib: it would send the request through http_proxy where one is set.
        host, port = self._address
        connection = http.client.HTTPConnection(host, port, timeout=_REQUEST_SECONDS)
        try:
            connection.request(method, f"/{self._scope}/{key}", body)
            yield connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise TransportError(
                f"the launcher's store does not answer: store=http://{host}:{port}, "
                f"rank={self._rank}, {method} {key}: {error!r}. It lives as long as "
                f"the launcher (horovodrun): does that still run, on a reachable host?"
            ) from error
        finally:
            connection.close()

    def _checked(self, response: http.client.HTTPResponse) -> bytes:
        if response.status != http.client.OK:
            host, port = self._address
            raise TransportError(
                f"the launcher's store refused a request: store=http://{host}:{port}, "
                f"rank={self._rank}, status={response.status} {response.reason}."
            )
        return response.read()


def missing_ranks(ranks: Sequence[int], size: int) -> str:
    """For people: whom a meeting waits for."""
    listed = ", ".join(map(str, ranks))
    return f"ranks that did not come to the rendezvous: {listed} of {size};"


def pack(values: Sequence[bytes]) -> bytes:
    """Byte strings as one: their number, their lengths, their contents."""
    head = struct.pack(f"<{len(values) + 1}Q", len(values), *map(len, values))
    return head + b"".join(values)


def unpack(joined: bytes) -> list[bytes]:
    """Inverse of ``pack``."""
    (number,) = struct.unpack_from("<Q", joined)
    lengths = struct.unpack_from(f"<{number}Q", joined, 8)
    values, start = [], 8 * (number + 1)
    for length in lengths:
        values.append(joined[start : start + length])
        start += length
    return values
