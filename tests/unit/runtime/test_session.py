"""The session in one process, and the pure parts of joining several."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from smp_tf.errors import ConfigError, NotInitializedError, SmpError
from smp_tf.runtime import failure
from smp_tf.runtime import session as smp
from smp_tf.runtime.failure import Guard
from smp_tf.runtime.join import compare_configs, share_of_cores

NUMBERS = {
    "rank": 0,
    "size": 1,
    "local_rank": 0,
    "local_size": 1,
    "mp_rank": 0,
    "mp_size": 1,
    "dp_rank": 0,
    "dp_size": 1,
    "pp_rank": 0,
    "pp_size": 1,
    "tp_rank": 0,
    "tp_size": 1,
    "rdp_rank": 0,
    "rdp_size": 1,
}
GROUPS = [f"get_{kind}_group" for kind in ("world", "mp", "dp", "pp", "tp", "rdp")]
MESSAGES: dict[str, tuple[Any, ...]] = {
    "send": (1, 0, smp.WORLD_RANK),
    "recv_from": (0, smp.WORLD_RANK),
    "broadcast": (1, smp.WORLD),
    "allgather": (1, smp.WORLD),
    "barrier": (),
    "mp_barrier": (),
    "dp_barrier": (),
    "pp_barrier": (),
}


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """No launcher, no configuration of the person who runs the tests, no session."""
    for name in list(os.environ):
        if name.startswith(("HOROVOD_", "OMPI_", "PMI_", "SMP_", "SM_HP_")):
            monkeypatch.delenv(name)
    smp.shutdown()
    yield
    smp.shutdown()


@pytest.mark.parametrize("name", ["config", *NUMBERS, *GROUPS, *MESSAGES])
def test_before_init_every_function_raises_by_its_name(name: str) -> None:
    assert not smp.is_initialized()
    with pytest.raises(NotInitializedError, match=rf"smp\.{name} needs .*smp\.init"):
        getattr(smp, name)(*MESSAGES.get(name, ()))


def test_one_process_is_a_world_of_its_own() -> None:
    smp.init({"microbatches": 4})
    assert smp.is_initialized()
    assert smp.config().microbatches == 4
    assert {name: getattr(smp, name)() for name in NUMBERS} == NUMBERS
    assert [getattr(smp, name)() for name in GROUPS] == [[0]] * 6
    for group in smp.CommGroup:
        smp.barrier(group)
        smp.broadcast("x", group)
        assert smp.allgather("x", group) == ["x"]
    for barrier in (smp.barrier, smp.mp_barrier, smp.dp_barrier, smp.pp_barrier):
        barrier()
    with pytest.raises(ValueError, match="the caller itself"):
        smp.send("x", 0, smp.PP_RANK)
    with pytest.raises(ValueError, match="must be 0..0"):
        smp.recv_from(1, smp.WORLD_RANK)


def test_init_is_called_once_unless_shut_down() -> None:
    smp.init()
    with pytest.raises(SmpError, match="second time"):
        smp.init()
    smp.shutdown()
    smp.shutdown()
    smp.init({"microbatches": 2})
    assert smp.config().microbatches == 2


def test_a_bad_configuration_leaves_no_session() -> None:
    with pytest.raises(ConfigError, match="did you mean `microbatches`"):
        smp.init({"microbatch": 2})
    assert not smp.is_initialized()


def test_one_process_needs_neither_tensorflow_nor_the_kernels() -> None:
    script = (
        "import sys, smp_tf as smp\n"
        "smp.init()\n"
        "smp.barrier()\n"
        "assert 'tensorflow' not in sys.modules\n"
        "assert smp.config().partitions == smp.size() == 1\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_differing_configurations_are_named_with_values_and_ranks() -> None:
    same = {"microbatches": 4, "pipeline": "simple", "timeout_s": 600.0}
    other = {"microbatches": 8, "pipeline": "simple", "timeout_s": 5.0}
    compare_configs([same, same, same])
    with pytest.raises(ConfigError) as caught:
        compare_configs([same, other, same])
    text = str(caught.value)
    assert "`microbatches`: 4 on ranks 0, 2; 8 on rank 1." in text
    assert "`timeout_s`: 600.0 on ranks 0, 2; 5.0 on rank 1." in text
    assert "pipeline" not in text


@pytest.mark.parametrize(
    ("cores_of_ranks", "shares"),
    [
        ([range(8)] * 2, [4, 4]),
        ([range(8)] * 3, [2, 2, 2]),
        ([range(2)] * 4, [1, 1, 1, 1]),
        ([range(4), range(4, 8)], [4, 4]),
        ([range(6), range(6), range(6, 8)], [3, 3, 2]),
    ],
)
def test_cores_are_divided_by_those_who_may_use_them(
    cores_of_ranks: list[range], shares: list[int]
) -> None:
    hellos = [{"host": "a", "cores": list(cores)} for cores in cores_of_ranks]
    hellos.append({"host": "b", "cores": list(range(8))})
    ranks = range(len(shares))
    assert [share_of_cores(hellos, rank) for rank in ranks] == shares


class PretendedEngine:
    """Remembers what a ``Guard`` asks of it."""

    def __init__(self, failure: str | None = None) -> None:
        self.news = failure
        self.aborted: list[str] = []
        self.closed: list[float] = []

    def failure(self) -> str | None:
        return self.news

    def abort(self, reason: str) -> None:
        self.aborted.append(reason)

    def close(self, seconds: float) -> None:
        self.closed.append(seconds)


def _guarded(engine: Any, call: Callable[[Guard], None]) -> None:
    guard = Guard(engine, rank=0, timeout_s=7.0)
    guard.install()
    try:
        call(guard)
    finally:
        guard.leave()


def test_the_guard_takes_all_its_hooks_out_again() -> None:
    before = (sys.excepthook, signal.getsignal(signal.SIGTERM))
    engine = PretendedEngine()

    def call(guard: Guard) -> None:
        assert sys.excepthook != before[0]
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL

    _guarded(engine, call)
    assert (sys.excepthook, signal.getsignal(signal.SIGTERM)) == before
    assert engine.closed == [7.0]
    assert signal.set_wakeup_fd(-1) == -1


def test_a_handler_of_the_users_own_stays() -> None:
    def handler(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, handler)
    try:
        _guarded(
            PretendedEngine(),
            lambda guard: None,
        )
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)


def test_an_uncaught_exception_is_told_to_the_peers(
    capsys: pytest.CaptureFixture[str],
) -> None:
    engine = PretendedEngine()

    def call(guard: Guard) -> None:
        error = ValueError("boom")
        sys.excepthook(ValueError, error, None)

    _guarded(engine, call)
    assert engine.aborted == ["ValueError: boom"]
    assert engine.closed == [0.0]  # nobody is waited for
    assert "ValueError: boom" in capsys.readouterr().err


def test_of_tensorflows_page_the_peers_are_told_what_our_op_says() -> None:
    engine = PretendedEngine()
    text = (
        "Graph execution error:\n\nDetected at node SmpRecvWait defined at ..\n\n"
        "smp_tf: waited for timeout_s=20 s: receive of h from rank 1\n\t [[{{..}}]]"
    )

    def call(guard: Guard) -> None:
        sys.excepthook(RuntimeError, RuntimeError(text), None)

    _guarded(engine, call)
    assert engine.aborted == ["waited for timeout_s=20 s: receive of h from rank 1"]


@pytest.mark.parametrize(
    ("news", "told"),
    [("rank 1 died", "rank 0 stops: rank 1 died"), (None, "rank 0 stops: it waited")],
)
def test_of_an_error_that_names_nobody_people_are_told_more(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    news: str | None,
    told: str,
) -> None:
    monkeypatch.setattr(failure, "_NEWS_SECONDS", 0.2)
    engine = PretendedEngine()
    asked = iter([None, None, news])  # the news come a little later than the error
    engine.failure = lambda: next(asked, news)  # type: ignore[method-assign]

    def call(guard: Guard) -> None:
        guard.explain_with(lambda error: "it waited" if str(error) == "?" else None)
        sys.excepthook(ValueError, ValueError("?"), None)

    _guarded(engine, call)
    assert told in capsys.readouterr().err


def test_after_a_failure_of_another_rank_nobody_is_waited_for() -> None:
    engine = PretendedEngine(failure="rank 1 died")
    _guarded(engine, lambda guard: None)
    assert engine.closed == [0.0]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # fork beside threads
def test_a_forked_child_is_no_rank() -> None:
    engine = PretendedEngine()

    def call(guard: Guard) -> None:
        child = os.fork()
        if child == 0:
            free = signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
            guard.leave()
            os._exit(0 if free and not engine.closed else 1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL

    _guarded(engine, call)
