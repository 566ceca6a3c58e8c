"""Scoring requests -> batches -> futures, over one device or several. asyncio only; what runs a batch is passed in.

Batches form while the devices are busy: there is no timer. Whoever waits longest opens the next batch, on the first
device that is free. Promises: a cancelled caller harms no neighbour; a failing batch is halved until only the culprit
fails, and the worker lives on; a device that fails on what another one scores gets no more work; a full queue refuses
at once; closing answers everyone.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

from reward.batching import BatchingOptions, take_batch
from reward.errors import QueueFullError, ScoringError

logger = logging.getLogger(__name__)

_REMEMBERED_KEYS = 16
"""Of the latest prompts that a device has worked on."""
_MOST_STRIKES = 3
"""Failures in a row of one device on what another one scored, before it is given up."""


class Sized(Protocol):
    """Anything with a length in tokens."""

    def __len__(self) -> int: ...


ItemT = TypeVar("ItemT", bound=Sized)
ResultT = TypeVar("ResultT")

RunBatch = Callable[[Sequence[ItemT]], Awaitable[Sequence[ResultT]]]
"""Runs one batch; as many results as items, in order."""
TakeBatch = Callable[[Sequence[ItemT]], list[int]]
"""Which of the waiting items, oldest first, form the next batch: indices, the oldest always among them."""
Job = Callable[[int], Awaitable[None]]
"""What a device, by its number, does when nothing waits."""


@dataclass(slots=True, eq=False)
class _Waiting(Generic[ItemT, ResultT]):
    item: ItemT
    future: asyncio.Future[ResultT] = field(repr=False)
    failed_on: _Device[ItemT, ResultT] | None = None
    """Alone. Whether it is to blame or the device, another one will tell."""


@dataclass(slots=True, eq=False)
class _Device(Generic[ItemT, ResultT]):
    number: int
    run: RunBatch[ItemT, ResultT]
    task: asyncio.Task[None] | None = None
    """At work."""
    running: list[_Waiting[ItemT, ResultT]] = field(default_factory=list)
    latest: deque[Hashable] = field(default_factory=lambda: deque(maxlen=_REMEMBERED_KEYS))
    last_turn: int = 0
    strikes: int = 0

    @property
    def in_service(self) -> bool:
        return self.strikes < _MOST_STRIKES


@dataclass(slots=True, eq=False)
class _Idle:
    job: Job
    key: Hashable
    future: asyncio.Future[None]


class BatchingWorker(Generic[ItemT, ResultT]):
    """Feeds batches to devices, one at a time to each. Start and close it from the same event loop."""

    def __init__(
        self,
        devices: Sequence[RunBatch[ItemT, ResultT]],
        options: BatchingOptions,
        on_queue_depth: Callable[[int], None] = lambda depth: None,
        take: TakeBatch[ItemT] | None = None,
        key_of: Callable[[ItemT], Hashable] = lambda item: None,
    ) -> None:
        """`take` chooses batches in place of `take_batch`, which goes by length alone.

        `key_of`: what a device is quicker with the second time; of those that are free, such a one is preferred.
        """
        self._devices = [_Device(number, run) for number, run in enumerate(devices)]
        self._options = options
        self._take = take or (lambda items: take_batch([len(item) for item in items], options))
        self._key_of = key_of
        self._on_queue_depth = on_queue_depth
        self._waiting: list[_Waiting[ItemT, ResultT]] = []
        self._idle: list[_Idle] = []
        self._turns = 0
        self._scheduled: asyncio.Handle | None = None
        self._started = self._closed = False

    @property
    def queue_depth(self) -> int:
        """Items that wait."""
        return len(self._waiting)

    def start(self) -> None:
        """From now on there is an event loop that runs."""
        self._started = True

    async def submit(self, items: Sequence[ItemT]) -> list[ResultT]:
        """Results in the order of `items`; all are queued or none.

        Raises `QueueFullError` at once when they do not fit, `ScoringError` when one of them fails or the
        worker is closed. Cancelled, it withdraws what is not running yet.
        """
        self._require_open()
        if len(items) > self._options.max_queue:
            raise ScoringError(f"{len(items)} completions in one call, but the queue holds {self._options.max_queue}")
        if len(self._waiting) + len(items) > self._options.max_queue:
            raise QueueFullError(f"{len(self._waiting)} completions wait to be scored; try again later")
        loop = asyncio.get_running_loop()
        mine: list[_Waiting[ItemT, ResultT]] = [_Waiting(item, loop.create_future()) for item in items]
        self._waiting.extend(mine)
        self._report_depth()
        self._schedule()
        try:
            results = await asyncio.gather(*(waiting.future for waiting in mine), return_exceptions=True)
        except asyncio.CancelledError:
            # gather has cancelled the futures; those still in the queue go now, running ones are ignored later.
            self._waiting = [waiting for waiting in self._waiting if not waiting.future.cancelled()]
            self._report_depth()
            raise
        found: list[ResultT] = []
        for result in results:
            if isinstance(result, BaseException):
                raise result
            found.append(result)
        return found

    async def when_idle(self, job: Job, key: Hashable) -> None:
        """Runs `job` on a device that is free while no item waits, and on one that knows `key`, if there is one.

        Raises what it raises, `ScoringError` when the worker is closed. Cancelled, it is not begun any more; a job that
        runs already is let end.
        """
        self._require_open()
        idle = _Idle(job, key, asyncio.get_running_loop().create_future())
        self._idle.append(idle)
        self._schedule()
        await idle.future

    async def aclose(self) -> None:
        """Refuses new work, answers everyone who waits with `ScoringError`, and ends what runs."""
        self._closed = True
        if self._scheduled is not None:
            self._scheduled.cancel()
        tasks = [device.task for device in self._devices if device.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        running = [waiting for device in self._devices for waiting in device.running]
        for waiting in [*running, *self._waiting]:
            _refuse(waiting.future)
        for idle in self._idle:
            _refuse(idle.future)
        for device in self._devices:
            device.running = []
        self._waiting, self._idle = [], []
        self._report_depth()

    def _require_open(self) -> None:
        if self._closed or not self._started:
            raise ScoringError("the scorer is closed")

    def _schedule(self) -> None:
        """Work is handed out in the next turn of the loop: what comes in the same one forms one batch."""
        if self._scheduled is None and not self._closed:
            self._scheduled = asyncio.get_running_loop().call_soon(self._hand_out)

    def _hand_out(self) -> None:
        self._scheduled = None
        while any(self._give_work(device) for device in self._free()):
            pass

    def _free(self) -> Iterator[_Device[ItemT, ResultT]]:
        """Those that can take work: first who knows what comes next, then who has rested the longest."""
        key = self._key_of(self._waiting[0].item) if self._waiting else self._idle[0].key if self._idle else None
        free = [device for device in self._devices if device.task is None and device.in_service]
        yield from sorted(free, key=lambda device: (key is None or key not in device.latest, device.last_turn))

    def _give_work(self, device: _Device[ItemT, ResultT]) -> bool:
        """Whether there was any that is for this device."""
        alone = not self._has_others(device)
        meant = [waiting for waiting in self._waiting if alone or waiting.failed_on is not device]
        if meant:
            batch = self._batch(meant)
            chosen = set(map(id, batch))
            self._waiting = [waiting for waiting in self._waiting if id(waiting) not in chosen]
            self._report_depth()
            # Already now: a task that is cancelled before its first step never runs a line.
            device.running = batch
            self._employ(device, [self._key_of(waiting.item) for waiting in batch], self._serve(device, batch))
            return True
        self._idle = [idle for idle in self._idle if not idle.future.done()]
        if self._waiting or not self._idle:
            return False
        idle = self._idle.pop(0)
        task = self._employ(device, [idle.key], self._do(device, idle))
        task.add_done_callback(lambda _: _refuse(idle.future))
        return True

    def _batch(self, waiting: list[_Waiting[ItemT, ResultT]]) -> list[_Waiting[ItemT, ResultT]]:
        if waiting[0].failed_on is not None:
            return waiting[:1]  # Alone, so that it is clear who fails.
        untried = [one for one in waiting if one.failed_on is None]
        return [untried[index] for index in self._take([one.item for one in untried])]

    def _employ(
        self, device: _Device[ItemT, ResultT], keys: Sequence[Hashable], work: Coroutine[object, object, None]
    ) -> asyncio.Task[None]:
        self._turns += 1
        device.last_turn = self._turns
        device.latest.extend(key for key in dict.fromkeys(keys) if key is not None and key not in device.latest)
        device.task = task = asyncio.create_task(work, name=f"reward-device-{device.number}")
        task.add_done_callback(lambda _: self._released(device))
        return task

    def _released(self, device: _Device[ItemT, ResultT]) -> None:
        device.task = None
        if not self._closed:
            self._schedule()

    async def _do(self, device: _Device[ItemT, ResultT], idle: _Idle) -> None:
        try:
            await idle.job(device.number)
        except Exception as error:
            if not idle.future.done():
                idle.future.set_exception(error)
            return
        if not idle.future.done():
            idle.future.set_result(None)

    async def _serve(self, device: _Device[ItemT, ResultT], batch: list[_Waiting[ItemT, ResultT]]) -> None:
        await self._run(device, batch)
        device.running = []

    async def _run(self, device: _Device[ItemT, ResultT], batch: list[_Waiting[ItemT, ResultT]]) -> None:
        batch = [waiting for waiting in batch if not waiting.future.done()]
        if not device.in_service:
            self._waiting = [*batch, *self._waiting]
            return
        if not batch:
            return
        results: Sequence[ResultT] | None
        try:
            results = await device.run([waiting.item for waiting in batch])
            if len(results) != len(batch):
                raise ScoringError(f"{len(results)} rewards for {len(batch)} completions")
        except Exception as error:
            if len(batch) == 1:
                self._failed(device, batch[0], error)
                return
            results = None
        if results is None:
            # Not among the exception's own lines: while it lives, so does all that the failed pass held in memory.
            middle = len(batch) // 2
            await self._run(device, batch[:middle])
            await self._run(device, batch[middle:])
            return
        device.strikes = 0
        for waiting, result in zip(batch, results, strict=True):
            if waiting.failed_on is not None and waiting.failed_on is not device:
                self._strike(waiting.failed_on)
            if not waiting.future.done():
                waiting.future.set_result(result)

    def _failed(self, device: _Device[ItemT, ResultT], waiting: _Waiting[ItemT, ResultT], error: Exception) -> None:
        if waiting.future.done():
            return
        if waiting.failed_on is None and self._has_others(device):
            waiting.failed_on = device
            self._waiting.insert(0, waiting)
            self._schedule()
            return
        logger.error("scoring one completion failed", exc_info=error)
        failure = ScoringError(f"the reward model failed on this completion: {error}")
        failure.__cause__ = error
        waiting.future.set_exception(failure)

    def _has_others(self, device: _Device[ItemT, ResultT]) -> bool:
        return any(other is not device and other.in_service for other in self._devices)

    def _strike(self, device: _Device[ItemT, ResultT]) -> None:
        device.strikes += 1
        if not device.in_service:
            logger.error("device %d fails on what another one scores: it gets no more work", device.number)

    def _report_depth(self) -> None:
        self._on_queue_depth(self.queue_depth)


def _refuse(future: asyncio.Future[ResultT]) -> None:
    if not future.done():
        future.set_exception(ScoringError("the scorer was closed before this was scored"))
