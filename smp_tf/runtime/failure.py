"""Nobody hangs: what this rank does when it fails, is stopped, or is done.

    an exception ends the script    excepthook   tell the peers which rank and why, or
                                                 tell people which rank failed before
    the script ends, sys.exit(n)    atexit       wait for slower peers, then leave
    SIGTERM                         a thread     say which rank failed first, then die
    kill -9                         -            the peers' monitors notice

SIGTERM is what launchers send to the survivors as soon as one rank is gone, so it races
with the news of that failure. Python runs signal handlers between byte codes of the
main thread only, and that may sit in a TensorFlow step for minutes while the launcher
kills after seconds. So the signal wakes a thread (through the descriptor of
``signal.set_wakeup_fd``, written by the C handler), and the thread does the rest.
"""

import atexit
import contextlib
import ctypes
import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

from smp_tf.errors import TransportError
from smp_tf.transport.engine import Engine

_NEWS_SECONDS = 2.0  # from SIGTERM until the failed rank must be known; launchers: 5 s
_TRACE_SECONDS = 1.0  # for the main thread to fail by itself and print its traceback
_REASON_CHARACTERS = 500
_OURS = "smp_tf: "  # what our ops begin an error with

logger = logging.getLogger("smp_tf")


class Guard:
    """Hooks of one session into this process: excepthook, atexit, SIGTERM."""

    def __init__(self, engine: Engine, rank: int, timeout_s: float) -> None:
        self._engine = engine
        self._rank = rank
        self._timeout_s = timeout_s
        self._explain: Callable[[BaseException], str | None] = lambda error: None
        self._active = False
        self._aborted = False
        self._next_hook: Callable[..., Any] = sys.excepthook
        self._pipe: tuple[int, int] | None = None

    @property
    def failed(self) -> bool:
        """Whether this rank has failed, or knows of another that has."""
        return self._aborted or (self._active and self._engine.failure() is not None)

    def install(self) -> None:
        """Install the hooks. SIGTERM only in the main thread and if nobody uses it."""
        global _installed
        _installed = self
        self._active = True
        self._next_hook, sys.excepthook = sys.excepthook, self._on_exception
        atexit.register(self.leave)
        if _in_main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            self._pipe = os.pipe()
            os.set_blocking(self._pipe[1], False)  # set_wakeup_fd insists
            signal.signal(signal.SIGTERM, self._on_sigterm)
            before = signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
            if before != -1:  # an event loop's; ours is then woken by _on_sigterm
                signal.set_wakeup_fd(before)
            threading.Thread(
                target=self._watch, args=(self._pipe[0],), name="smp_tf", daemon=True
            ).start()

    def explain_with(self, explain: Callable[[BaseException], str | None]) -> None:
        """Learn about errors that may follow from another rank's without naming it.

        Args:
            explain: what to tell of such an error where no rank is known to have
                failed; None for any other error.
        """
        self._explain = explain

    def leave(self) -> None:
        """Close the engine in order and take the hooks out again; never raises.

        Waits for the other ranks to leave too, as long as no rank has failed: a slower
        one may still need what this rank sent.
        """
        if not self._active:
            return
        self._aborted = failed = self.failed
        with contextlib.ExitStack() as stack:
            if _in_main_thread():
                # Blocks outside Python, where Ctrl-C could not be delivered.
                handler = signal.signal(signal.SIGINT, signal.SIG_DFL)
                stack.callback(signal.signal, signal.SIGINT, handler)
            try:
                self._engine.close(0.0 if failed else self._timeout_s)
            except TransportError as error:
                logger.warning("rank %d, while leaving: %s", self._rank, error)
        self._remove()

    def abort(self, reason: str) -> None:
        """Tell the peers that this rank gives up; the first failure keeps its name."""
        self._aborted = True
        self._engine.abort(self._engine.failure() or reason[:_REASON_CHARACTERS])

    def _remove(self) -> None:
        self._active = False
        atexit.unregister(self.leave)
        if sys.excepthook == self._on_exception:
            sys.excepthook = self._next_hook
        if self._pipe is not None and _in_main_thread():
            writer = self._pipe[1]
            if signal.getsignal(signal.SIGTERM) == self._on_sigterm:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
            fd = signal.set_wakeup_fd(-1)
            if fd not in (-1, writer):
                signal.set_wakeup_fd(fd)
            os.close(writer)  # the thread reads the end and closes its own side
            self._pipe = None

    def _on_exception(
        self,
        kind: type[BaseException],
        error: BaseException,
        trace: TracebackType | None,
    ) -> None:
        news = None
        if self._active:
            explanation = self._explain(error)
            news = self._news() if explanation else self._engine.failure()
            news = news or explanation
        # The traceback first: the launcher stops this rank soon after the peers know.
        self._next_hook(kind, error, trace)
        if news is not None and news not in str(error):
            print(f"smp_tf: rank {self._rank} stops: {news}", file=sys.stderr)
        if self._active:
            self.abort(_reason(kind, error))

    def _news(self) -> str | None:
        """Which rank failed first; the news may take a moment."""
        deadline = time.monotonic() + _NEWS_SECONDS
        while (news := self._engine.failure()) is None and time.monotonic() < deadline:
            time.sleep(0.02)
        return news

    def _on_sigterm(self, signum: int, frame: FrameType | None) -> None:
        if self._pipe is not None:
            with contextlib.suppress(BlockingIOError):
                os.write(self._pipe[1], bytes([signum]))

    def _watch(self, reader: int) -> None:
        """Thread: wait for the number of a signal, until the other end is closed."""
        with os.fdopen(reader, "rb", buffering=0) as pipe:
            while signals := pipe.read(1):
                ours = signal.getsignal(signal.SIGTERM) == self._on_sigterm
                if signals[0] == signal.SIGTERM and ours and self._active:
                    self._stop()

    def _stop(self) -> None:
        """Print why this rank stops, and die of SIGTERM as it would have without us."""
        news = self._news()
        # Not sys.stderr: the thread that holds its lock may be stuck.
        line = f"smp_tf: rank {self._rank} stops: {news or 'SIGTERM'}\n"
        os.write(2, line.encode())
        if news is None:
            self._engine.abort("stopped by SIGTERM")
        else:
            time.sleep(_TRACE_SECONDS)
        # signal.signal works in the main thread only.
        libc = ctypes.CDLL(None)
        libc.signal.argtypes = (ctypes.c_int, ctypes.c_void_p)
        libc.signal(signal.SIGTERM, None)
        os.kill(os.getpid(), signal.SIGTERM)


def _reason(kind: type[BaseException], error: BaseException) -> str:
    """What an exception says: TensorFlow puts what our ops say under a page of code."""
    text = traceback.format_exception_only(kind, error)[-1].strip()
    ours = [line.partition(_OURS)[2] for line in text.splitlines() if _OURS in line]
    return ours[0] if ours else text


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


_installed: Guard | None = None


def _forget_in_child() -> None:
    """A forked child (a data loader) is not a rank and must not act as one.

    It would otherwise leave the parent's job at its end, and a SIGTERM to it, such as
    ``multiprocessing.Pool.terminate`` sends, would stop the parent through the pipe
    that both share.
    """
    guard = _installed
    if guard is not None and guard._active:
        guard._remove()


os.register_at_fork(after_in_child=_forget_in_child)
