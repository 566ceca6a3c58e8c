"""Candidate sets on their way into the feedback store, off the hot path: a bounded queue and one writing thread.

Nothing here can cost an answer. A full queue, or a store that stays away, drops sets and counts them.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass

from feedback.judgements import CandidateSet, FeedbackStore, Judgement, RefusedError, StoredJudgement, StoreError
from feedback.redaction import Redactor
from proxy.metrics import ProxyMetrics

_log = logging.getLogger(__name__)

_FIRST_DELAY_S = 0.1
_MAX_DELAY_S = 5.0


@dataclass(frozen=True, slots=True)
class RecorderLimits:
    max_queue: int = 1000
    """Candidate sets that wait to be written."""
    max_queue_bytes: int = 64 * 1024 * 1024
    """What they may hold together, roughly."""
    max_batch: int = 100
    """Sets in one transaction."""
    retry_s: float = 30.0
    """How long a batch is tried again while the store fails."""
    flush_s: float = 10.0
    """What the end of the server leaves for writing what still waits."""
    second_look_s: float = 0.0
    """Where another process may be about to write a set: how long after the first look for it comes a second."""


@dataclass(frozen=True, slots=True)
class _Waiting:
    candidate_set: CandidateSet
    size_bytes: int


class Recorder:
    """Started and closed with the server. `record` is for the event loop, `judge` from anywhere in it."""

    def __init__(self, store: FeedbackStore, redactor: Redactor, limits: RecorderLimits, metrics: ProxyMetrics) -> None:
        self.store = store
        self._redactor = redactor
        self._limits = limits
        self._metrics = metrics
        self._queue: queue.Queue[_Waiting | None] = queue.Queue(limits.max_queue)
        self._lock = threading.Lock()
        self._unwritten: dict[str, CandidateSet] = {}
        self._bytes = 0
        self._opened = False
        self._closing = threading.Event()
        self._give_up_at = float("inf")
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        return "the recorder"

    async def start(self) -> None:
        """Never raises: a store that cannot be reached now is tried again with the first sets to write."""
        await asyncio.to_thread(self._try_to_open)
        self._thread = threading.Thread(target=self._work, name="recorder", daemon=True)
        self._thread.start()

    def record(self, sets: Sequence[CandidateSet], size_bytes: int) -> None:
        """Queues sets of one request, `size_bytes` in all; drops them where there is no room. Never blocks."""
        for one in sets:
            waiting = _Waiting(one, size_bytes // len(sets))
            with self._lock:
                fits = self._bytes + waiting.size_bytes <= self._limits.max_queue_bytes
                if fits and self._thread is not None and not self._closing.is_set():
                    self._bytes += waiting.size_bytes
                    self._unwritten[one.completion_id] = one
                else:
                    fits = False
            if not fits or not self._put(waiting):
                self._metrics.recorder_dropped.labels("queue_full").inc()
        self._metrics.recorder_queue.set(self._queue.qsize())

    async def judge(self, judgement: Judgement) -> StoredJudgement:
        """Writes a judgement; it is durable when this returns. Raises `StoreError`."""
        with self._lock:
            unwritten = self._unwritten.get(judgement.completion_id)
        return await asyncio.to_thread(self._judge, judgement, unwritten)

    async def candidate_set(self, completion_id: str) -> CandidateSet | None:
        """Also one that has not been written yet. Raises `StoreError`."""
        with self._lock:
            unwritten = self._unwritten.get(completion_id)
        if unwritten is not None:
            return unwritten
        found = await asyncio.to_thread(self._find, completion_id)
        if found is None and self._limits.second_look_s > 0:
            await asyncio.sleep(self._limits.second_look_s)
            found = await asyncio.to_thread(self._find, completion_id)
        return found

    async def aclose(self) -> None:
        """Writes what waits, for `flush_s` at most, and closes the store."""
        if self._thread is not None:
            self._give_up_at = time.monotonic() + self._limits.flush_s
            with self._lock:
                self._closing.set()
            await asyncio.to_thread(self._stop, self._thread)
        await asyncio.to_thread(self.store.close)

    def _put(self, waiting: _Waiting) -> bool:
        try:
            self._queue.put_nowait(waiting)
        except queue.Full:
            self._forget([waiting])
            return False
        return True

    def _stop(self, thread: threading.Thread) -> None:
        """The mark of the end must get in, however full the queue is: the thread empties it meanwhile."""
        try:
            self._queue.put(None, timeout=self._limits.flush_s)
        except queue.Full:
            _log.error("The recorder could not be ended in time")
            return
        # A write that hangs in the database is not waited for for ever: the thread is a daemon.
        thread.join(self._limits.flush_s + _MAX_DELAY_S)

    def _judge(self, judgement: Judgement, unwritten: CandidateSet | None) -> StoredJudgement:
        self._open()
        known = None if unwritten is None else self._redactor.candidate_set(unwritten)
        return self.store.add_judgement(self._redactor.judgement(judgement), known)

    def _find(self, completion_id: str) -> CandidateSet | None:
        self._open()
        return self.store.candidate_set(completion_id)

    def _open(self) -> None:
        if not self._opened:
            self.store.open()
            self._opened = True

    def _try_to_open(self) -> None:
        try:
            self._open()
        except StoreError as error:
            self._metrics.recorder_failures.inc()
            _log.error("Candidate sets cannot be written now, answers are not affected: %s", error)

    def _work(self) -> None:
        ended = False
        while not ended:
            batch, ended = self._next_batch()
            if batch:
                self._write_or_drop(batch)
                self._forget(batch)
            self._metrics.recorder_queue.set(self._queue.qsize())

    def _next_batch(self) -> tuple[list[_Waiting], bool]:
        """What waits, up to the limit; and whether the end has come."""
        batch: list[_Waiting] = []
        try:
            item = self._queue.get()
            while item is not None:
                batch.append(item)
                if len(batch) == self._limits.max_batch:
                    return batch, False
                item = self._queue.get_nowait()
        except queue.Empty:
            return batch, False
        return batch, True

    def _write_or_drop(self, batch: Sequence[_Waiting]) -> None:
        try:
            self._write(batch)
        except Exception:  # the thread must live on; what it could not write is counted
            if len(batch) > 1:
                # One that cannot be redacted, or that the store does not take, must not cost the others.
                for waiting in batch:
                    self._write_or_drop([waiting])
                return
            _log.exception("A candidate set could not be written")
            self._drop(batch, "error")

    def _write(self, batch: Sequence[_Waiting]) -> None:
        """Tries again while the store is away. Raises what trying again does not mend."""
        sets = [self._redactor.candidate_set(waiting.candidate_set) for waiting in batch]
        give_up_at = time.monotonic() + self._limits.retry_s
        delay_s = _FIRST_DELAY_S
        while True:
            try:
                self._open()
                self.store.add_sets(sets)
            except RefusedError:
                raise
            except StoreError as error:
                self._metrics.recorder_failures.inc()
                if time.monotonic() + delay_s > min(give_up_at, self._give_up_at):
                    _log.error("%d candidate sets were dropped: %s", len(batch), error)
                    self._drop(batch, "store")
                    return
                _log.warning("The feedback store failed and is tried again in %.1f s: %s", delay_s, error)
                # Not an unbroken sleep: the end of the server cuts it short once.
                if self._closing.is_set():
                    time.sleep(delay_s)
                else:
                    self._closing.wait(delay_s)
                delay_s = min(delay_s * 2, _MAX_DELAY_S)
            else:
                self._metrics.recorder_written.inc(len(batch))
                return

    def _drop(self, batch: Sequence[_Waiting], reason: str) -> None:
        self._metrics.recorder_dropped.labels(reason).inc(len(batch))

    def _forget(self, batch: Sequence[_Waiting]) -> None:
        with self._lock:
            for waiting in batch:
                self._bytes -= waiting.size_bytes
                self._unwritten.pop(waiting.candidate_set.completion_id, None)
