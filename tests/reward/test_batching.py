"""The worker's promises, each with the event that it is about; nothing here waits for time to pass."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager

import pytest

from reward.batching import BatchingOptions
from reward.batching_worker import BatchingWorker
from reward.errors import QueueFullError, ScoringError

Item = str


class Device:
    """Rewards an item by its number of `x`. Every batch waits for `allow`, and `bad` items break theirs."""

    def __init__(self) -> None:
        self.batches: list[list[Item]] = []
        self.entered = asyncio.Semaphore(0)
        """One release a batch that has begun."""
        self._allowed = asyncio.Semaphore(0)
        self._open = False

    async def __call__(self, items: Sequence[Item]) -> list[float]:
        self.batches.append(list(items))
        self.entered.release()
        if not self._open:
            await self._allowed.acquire()
        if any("bad" in item for item in items):
            raise RuntimeError("scripted")
        return [float(item.count("x")) for item in items]

    def allow(self) -> None:
        self._allowed.release()

    def open(self) -> None:
        """From now on nothing waits."""
        self._open = True
        self._allowed.release()


@asynccontextmanager
async def running(
    on_depth: Callable[[int], None] = lambda depth: None, **limits: int
) -> AsyncIterator[tuple[Device, BatchingWorker[Item, float]]]:
    device = Device()
    worker = BatchingWorker([device], BatchingOptions(**limits), on_depth)
    worker.start()
    try:
        yield device, worker
    finally:
        await worker.aclose()


async def submitted(worker: BatchingWorker[Item, float], *items: Item) -> asyncio.Task[list[float]]:
    """A caller whose items are in the queue when this returns."""
    task = asyncio.create_task(worker.submit(items))
    await asyncio.sleep(0)  # one turn of the loop: submit runs up to its wait for results
    return task


async def test_rewards_come_in_the_order_of_the_items() -> None:
    async with running(max_batch_tokens=8) as (device, worker):
        device.open()
        items = ["x" * length for length in (7, 1, 4, 2, 7, 3, 1)]
        assert await worker.submit(items) == [7, 1, 4, 2, 7, 3, 1]
        assert len(device.batches) > 1
        assert await worker.submit([]) == []


async def test_a_batch_forms_while_the_device_is_busy() -> None:
    async with running() as (device, worker):
        first = await submitted(worker, "x")
        await device.entered.acquire()
        others = [await submitted(worker, "x" * count) for count in (2, 3)]
        device.open()
        assert [await task for task in (first, *others)] == [[1], [2], [3]]
        assert [len(batch) for batch in device.batches] == [1, 2]


async def test_the_longest_waiting_is_never_passed_over() -> None:
    """A long item waits for one batch at most, however many short ones keep coming."""
    async with running(max_batch_tokens=4) as (device, worker):
        first = await submitted(worker, "x")
        await device.entered.acquire()
        long = await submitted(worker, "x" * 50)
        short = [await submitted(worker, "x") for _ in range(10)]
        device.allow()
        await device.entered.acquire()
        assert device.batches[1] == ["x" * 50]
        device.open()
        assert await long == [50]
        await asyncio.gather(first, *short)


async def test_a_caller_cancelled_while_waiting_harms_no_neighbour_and_frees_its_places() -> None:
    depths: list[int] = []
    async with running(depths.append, max_queue=3) as (device, worker):
        first = await submitted(worker, "x")
        await device.entered.acquire()
        leaving = await submitted(worker, "xx", "xx")
        staying = await submitted(worker, "xxx")
        with pytest.raises(QueueFullError):
            await worker.submit(["x"])
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        assert depths[-1] == 1
        joining = await submitted(worker, "x", "xxxx")
        device.open()
        assert [await task for task in (first, staying, joining)] == [[1], [3], [1, 4]]
        assert sorted(device.batches[1]) == ["x", "xxx", "xxxx"]


async def test_a_caller_cancelled_while_running_harms_no_neighbour() -> None:
    async with running(max_batch_size=2) as (device, worker):
        first = await submitted(worker, "x")
        await device.entered.acquire()
        leaving, staying = await submitted(worker, "xx", "bad"), await submitted(worker, "xxx")
        device.allow()
        await device.entered.acquire()
        assert device.batches[1] == ["xx", "bad"]
        leaving.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaving
        device.open()
        assert [await first, await staying] == [[1], [3]]
        # Nobody wants the halves of the failed batch any more: they do not run.
        assert device.batches[2] == ["xxx"]


async def test_a_failing_batch_is_halved_until_only_the_culprit_fails(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as (device, worker):
        first = await submitted(worker, "x")
        await device.entered.acquire()
        tasks = [await submitted(worker, item) for item in ("x", "xx", "bad", "xxxx", "xxxxx")]
        device.open()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert await first == [1]
        culprit = outcomes.pop(2)
        assert outcomes == [[1], [2], [4], [5]]
        assert isinstance(culprit, ScoringError)
        assert isinstance(culprit.__cause__, RuntimeError)
        assert "scripted" in str(culprit)
        assert [record.exc_info is not None for record in caplog.records] == [True]
        # And the worker lives on.
        assert await worker.submit(["xxx"]) == [3]


async def test_a_caller_with_one_bad_item_gets_an_error_and_others_their_rewards() -> None:
    async with running() as (device, worker):
        device.open()
        mixed, fine = await submitted(worker, "x", "bad", "bad too"), await submitted(worker, "xx")
        with pytest.raises(ScoringError):
            await mixed
        assert await fine == [2]


async def test_a_device_that_miscounts_is_an_error_not_a_mix_up() -> None:
    async def short(items: Sequence[Item]) -> list[float]:
        return [0.0] * (len(items) - 1)

    worker = BatchingWorker([short], BatchingOptions())
    worker.start()
    with pytest.raises(ScoringError, match="0 rewards for 1 completions"):
        await worker.submit(["x", "xx"])
    await worker.aclose()


async def test_a_full_queue_refuses_at_once_and_takes_all_or_none() -> None:
    async with running(max_queue=2) as (device, worker):
        first = await submitted(worker, "x")
        await device.entered.acquire()
        one = await submitted(worker, "x")
        with pytest.raises(QueueFullError) as caught:
            await worker.submit(["xx", "xx"])
        assert caught.value.retry_after_s > 0
        two = await submitted(worker, "xxx")
        device.open()
        assert [await task for task in (first, one, two)] == [[1], [1], [3]]
        assert ["xx" in batch for batch in device.batches] == [False, False]


async def test_a_call_that_can_never_fit_says_so() -> None:
    async with running(max_queue=2) as (_, worker):
        with pytest.raises(ScoringError, match="queue holds 2"):
            await worker.submit(["x"] * 3)


async def test_closing_answers_everyone_and_refuses_the_next() -> None:
    depths: list[int] = []
    async with running(depths.append, max_batch_size=1) as (device, worker):
        on_device = await submitted(worker, "x")
        await device.entered.acquire()
        queued = await submitted(worker, "x", "xx")
        await worker.aclose()
        for task in (on_device, queued):
            with pytest.raises(ScoringError, match="closed"):
                await task
        with pytest.raises(ScoringError, match="closed"):
            await worker.submit(["x"])
        assert depths[-1] == 0
        await worker.aclose()


@pytest.mark.parametrize("turns", range(5))
async def test_closing_answers_in_whatever_turn_of_the_loop(turns: int) -> None:
    async def job(device: int) -> None:
        await asyncio.Event().wait()

    for work in ("score", "idle"):
        async with running() as (_, worker):
            asked: asyncio.Task[object]
            asked = asyncio.create_task(worker.submit(["x"]) if work == "score" else worker.when_idle(job, "x"))
            for _ in range(turns):
                await asyncio.sleep(0)
            await worker.aclose()
            async with asyncio.timeout(5):
                with pytest.raises(ScoringError, match="closed"):
                    await asked


async def test_closing_while_a_failing_batch_is_halved_answers_everyone() -> None:
    async with running() as (device, worker):
        first = await submitted(worker, "x")
        await device.entered.acquire()
        tasks = [await submitted(worker, item) for item in ("x", "bad", "xx", "xxx")]
        for _ in range(2):
            device.allow()
            await device.entered.acquire()
        assert [len(batch) for batch in device.batches] == [1, 4, 2]  # the first half has begun
        await worker.aclose()
        assert await first == [1]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(outcome, ScoringError) for outcome in outcomes)


async def test_a_worker_that_was_not_started_refuses() -> None:
    worker = BatchingWorker([Device()], BatchingOptions())
    with pytest.raises(ScoringError):
        await worker.submit(["x"])
    await worker.aclose()


async def test_the_depth_counts_who_waits_not_who_runs() -> None:
    depths: list[int] = []
    async with running(depths.append) as (device, worker):
        first = await submitted(worker, "x")
        await device.entered.acquire()
        second = await submitted(worker, "x", "x")
        assert depths == [1, 0, 2]
        device.open()
        await asyncio.gather(first, second)
        assert depths[-1] == 0
