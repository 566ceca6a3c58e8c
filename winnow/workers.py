"""Several server processes on one socket: started, watched, replaced when one dies, ended together. Unix only."""

from __future__ import annotations

import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from winnow.console import BAD_INPUT, FAILED, CommandError, exits, say

_SIGNALS = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_YOUNG_S = 5.0
"""A worker that dies sooner than this will likely die again."""
_PAUSE_S = 1.0
"""Before such a worker is replaced: a process a second is no load, a busy loop is."""


@dataclass(slots=True)
class _Workers:
    work: Callable[[int], None]
    """Runs one server until a signal; gets the worker's number."""
    started_at: dict[int, float] = field(default_factory=dict)
    """By process id, seconds of the monotonic clock."""
    numbers: dict[int, int] = field(default_factory=dict)
    stopping: bool = False
    exit_code: int = 0

    def start(self, number: int) -> None:
        pid = os.fork()
        if pid == 0:
            os._exit(_child(self.work, number))
        self.started_at[pid] = time.monotonic()
        self.numbers[pid] = number

    def signal_all(self, number: int) -> None:
        for pid in self.numbers:
            os.kill(pid, number)

    def reap(self) -> None:
        """Takes note of every worker that has ended, and replaces those that should not have."""
        while self.numbers:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            self._ended(pid, os.waitstatus_to_exitcode(status))

    def _ended(self, pid: int, code: int) -> None:
        number, lived_s = self.numbers.pop(pid), time.monotonic() - self.started_at.pop(pid)
        _forget_gauges(pid)
        if self.stopping:
            return
        if code == BAD_INPUT:
            # It has said what is wrong, and the next one would say it again.
            self.exit_code = code
            self.stop(signal.SIGTERM)
            return
        say(f"winnow: worker {number} ended ({code}); starting another")
        if lived_s < _YOUNG_S:
            time.sleep(_PAUSE_S)
        self.start(number)

    def stop(self, number: int) -> None:
        self.stopping = True
        self.signal_all(number)


def supervise(count: int, work: Callable[[int], None]) -> None:
    """Runs `work` in `count` processes until a signal ends them all; SIGHUP is handed on to each.

    Raises `CommandError` when a worker found its configuration wrong, and where processes cannot be forked.
    """
    if not hasattr(os, "fork"):
        raise CommandError("server.workers over 1 needs a Unix system")
    if "prometheus_client" in sys.modules:
        raise RuntimeError("prometheus_client decides on import whether it counts for several processes")
    with _metrics_folder(), _blocked():
        workers = _Workers(work)
        for number in range(count):
            workers.start(number)
        while workers.numbers:
            received = signal.sigwait(_SIGNALS)
            if received == signal.SIGCHLD:
                workers.reap()
            elif received == signal.SIGHUP:
                workers.signal_all(received)
            else:
                workers.stop(received)
    if workers.exit_code:
        raise CommandError("a worker could not start; it has said why", workers.exit_code)


def _child(work: Callable[[int], None], number: int) -> int:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    try:
        with exits():
            work(number)
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else FAILED
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return FAILED
    return 0


@contextmanager
def _blocked() -> Iterator[None]:
    """Signals wait to be taken by `sigwait`: none is lost between looking and waiting."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


@contextmanager
def _metrics_folder() -> Iterator[None]:
    """Where the workers' counts meet, so that any of them can answer `/metrics` for all."""
    folder = tempfile.mkdtemp(prefix="winnow-metrics-")
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = folder
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _forget_gauges(pid: int) -> None:
    """A dead worker's gauges no longer count. Its counters and histograms do."""
    from prometheus_client.multiprocess import mark_process_dead

    mark_process_dead(pid)  # type: ignore[no-untyped-call]
