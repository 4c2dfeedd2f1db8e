"""Timelines of a session: from the recorder's memory into trace files.

    kernels  --events-->  a thread, twice a second and at the end  --runs-->  files

The kernels always record the last run; while anything is written, they keep complete
runs until the thread takes them. So a step pays for reading the clock, and the thread
for the text.
"""

import atexit
import logging
import os
import threading
from pathlib import Path
from typing import Any

from smp_tf.errors import TransportError
from smp_tf.report.timeline.file import RunText, Writer
from smp_tf.report.timeline.run import split_runs
from smp_tf.runtime import timeline_steps
from smp_tf.runtime.join import Session
from smp_tf.runtime.timeline_writer import TraceFile
from smp_tf.transport.messages import CommGroup

_PERIOD_SECONDS = 0.5
_KEPT_EVENTS = 2**18  # between two looks of the thread; 12 MiB
_END_SECONDS = 5.0  # for the thread, which may be writing to a slow disk

logger = logging.getLogger("smp_tf")


class Recorder:
    """Everything that one session writes; its methods may be called by any thread."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._writer = _writer_of(session)
        self._texts: dict[int, RunText] = {}
        self._files: dict[Path, TraceFile] = {}
        self._active: dict[Path, int] = {}  # folder -> how many want it
        self._dropped = 0
        self._has_ended = threading.Event()
        self._thread: threading.Thread | None = None
        atexit.register(self.end)

    def start(self, folder: Path) -> None:
        """Write the runs that begin from now on into ``folder``, too."""
        if self._has_ended.is_set():
            return
        events = _events()
        with self._lock:
            try:
                self._take()
                if not self._active:
                    events.keep(_KEPT_EVENTS)
            except TransportError as error:
                logger.warning(
                    "rank %d: no timeline is recorded: %s", self._session.rank, error
                )
                self._has_ended.set()
                return
            if folder not in self._files:
                self._files[folder] = TraceFile(folder, self._writer)
            self._active[folder] = self._active.get(folder, 0) + 1
            if self._thread is None:
                self._thread = threading.Thread(
                    target=self._watch, name="smp_tf timeline", daemon=True
                )
                self._thread.start()

    def stop(self, folder: Path) -> None:
        """Write what is complete, and then no more for this one ``start``."""
        with self._lock:
            self._take()
            if folder not in self._active:
                return
            self._active[folder] -= 1
            if not self._active[folder]:
                del self._active[folder]
            if not self._active:
                self._keep_nothing()

    def end(self) -> None:
        """Write what is left and close the files; never raises."""
        if os.getpid() != self._process:  # a forked child, at its end
            return
        atexit.unregister(self.end)
        self._has_ended.set()
        if self._thread is not None:
            self._thread.join(_END_SECONDS)
        # The thread has the lock only if the disk does not answer.
        if not self._lock.acquire(timeout=_END_SECONDS):
            return
        try:
            self._take()
            if self._active:
                self._keep_nothing()
            self._active.clear()
            for file in self._files.values():
                file.close(self._dropped)
            self._files.clear()
        finally:
            self._lock.release()

    def _watch(self) -> None:
        while not self._has_ended.wait(_PERIOD_SECONDS):
            with self._lock:
                self._take()

    def _take(self) -> None:
        """Write the complete runs; the caller has the lock."""
        try:
            if self._active:
                self._write_kept()
        except Exception:  # no reason to end the training
            logger.exception("rank %d: the timeline ends here", self._session.rank)
            self._active.clear()

    def _write_kept(self) -> None:
        for events in split_runs(_events().take()):
            step = timeline_steps.find(events[0].program)
            if step is None:
                continue
            if step.number not in self._texts:
                text = RunText(step.planned, step.labels, self._writer)
                self._texts[step.number] = text
            text_of_run = self._texts[step.number].of(events)
            for folder in self._active:
                self._files[folder].write(step.planned, text_of_run)

    def _keep_nothing(self) -> None:
        events = _events()
        self._dropped += events.dropped()
        events.keep(0)


def _writer_of(session: Session) -> Writer:
    return Writer(
        rank=session.rank,
        pp_rank=session.topology.pp_rank(session.rank),
        group=tuple(session.messages.members(CommGroup.PP_GROUP)),
        session=session.name,
        started=session.started,
        offset_ns=session.clock.offset_ns,
        error_ns=session.clock.error_ns,
    )


_recorder: Recorder | None = None


def recorder_of(session: Session) -> Recorder:
    """The recorder of the session that is open."""
    global _recorder
    if _recorder is None:
        _recorder = Recorder(session)
    return _recorder


def begin(session: Session) -> None:
    """A session begins: with ``trace_dir``, everything is written."""
    timeline_steps.forget()
    if session.config.trace_dir is not None:
        recorder_of(session).start(Path(session.config.trace_dir).expanduser())


def end() -> None:
    """The session ends."""
    global _recorder
    ended, _recorder = _recorder, None
    if ended is not None:
        ended.end()
    timeline_steps.forget()


def _events() -> Any:
    """The recorder's memory. It loads TensorFlow, which a process that only sends
    messages does not need."""
    from smp_tf.transport import events

    return events
