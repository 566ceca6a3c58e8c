"""Several devices behind one queue: which works on what, and what becomes of one that fails."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from reward.batching import BatchingOptions
from reward.batching_worker import BatchingWorker
from reward.errors import ScoringError

WAIT_S = 20


class Device:
    """Rewards an item by its length once the test allows it; fails on `bad` items, and on all while `broken`."""

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.broken = False
        self._entered = asyncio.Semaphore(0)
        self._allowed = asyncio.Semaphore(0)
        self._open = False

    async def __call__(self, items: Sequence[str]) -> list[float]:
        self.batches.append(list(items))
        self._entered.release()
        if not self._open:
            await self._allowed.acquire()
        if self.broken or any("bad" in item for item in items):
            raise RuntimeError("scripted")
        return [float(len(item)) for item in items]

    async def entered(self) -> None:
        async with asyncio.timeout(WAIT_S):
            await self._entered.acquire()

    def allow(self) -> None:
        self._allowed.release()

    def open(self) -> None:
        self._open = True
        self._allowed.release()


Worker = BatchingWorker[str, float]


@asynccontextmanager
async def running(count: int = 2, **limits: int) -> AsyncIterator[tuple[list[Device], Worker]]:
    devices = [Device() for _ in range(count)]
    worker: Worker = BatchingWorker(devices, BatchingOptions(**limits), key_of=lambda item: item[0])
    worker.start()
    try:
        yield devices, worker
    finally:
        await worker.aclose()


async def submitted(worker: Worker, *items: str) -> asyncio.Task[list[float]]:
    """A caller whose items are with a device, or wait for one, when this returns."""
    task = asyncio.create_task(worker.submit(items))
    for _ in range(3):
        await asyncio.sleep(0)
    return task


async def test_all_devices_work_at_once_and_batches_form_while_they_do() -> None:
    async with running() as ((one, other), worker):
        tasks = [await submitted(worker, item) for item in ("a", "bb", "cc", "dd")]
        await one.entered()
        await other.entered()
        assert [one.batches, other.batches] == [[["a"]], [["bb"]]]
        other.open()
        assert await tasks[1] == [2]
        await other.entered()
        assert other.batches[1:] == [["cc", "dd"]]
        one.open()
        assert await asyncio.gather(*tasks) == [[1], [2], [2], [2]]


async def test_a_large_call_is_spread_batch_by_batch() -> None:
    async with running(max_batch_size=2) as (devices, worker):
        scoring = await submitted(worker, *"abcdefgh")
        for device in devices:
            await device.entered()
            device.open()
        assert await scoring == [1.0] * 8
        assert sum(len(device.batches) for device in devices) == 4


async def test_a_device_that_knows_the_beginning_is_preferred() -> None:
    async with running() as ((one, other), worker):
        one.open()
        other.open()
        for item in ("a", "b", "a", "aa", "b", "a", "bb"):
            await worker.submit([item])
        assert [one.batches, other.batches] == [[["a"], ["a"], ["aa"], ["a"]], [["b"], ["b"], ["bb"]]]


async def test_knowing_the_beginning_is_no_reason_to_wait() -> None:
    async with running() as ((one, other), worker):
        first = await submitted(worker, "a")
        second = await submitted(worker, "a")
        await other.entered()
        other.open()
        assert await second == [1]
        one.open()
        await first


async def test_what_only_one_device_fails_on_is_scored_by_another() -> None:
    async with running() as ((one, other), worker):
        one.broken = True
        one.open()
        other.open()
        assert await worker.submit(["a", "aa", "aaa"]) == [1, 2, 3]
        assert await worker.submit(["b"]) == [1]


async def test_a_device_that_keeps_failing_gets_no_more_work(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as ((one, other), worker):
        one.broken = True
        one.open()
        other.open()
        for count in range(1, 10):
            assert await worker.submit(["a" * count] * count) == [float(count)] * count
        tried = len(one.batches)
        for _ in range(5):
            await worker.submit(["b"])
        assert len(one.batches) == tried
    assert "device 0 fails on what another one scores" in caplog.text


async def test_a_bad_item_is_tried_on_both_and_neither_is_blamed(caplog: pytest.LogCaptureFixture) -> None:
    async with running() as ((one, other), worker):
        one.open()
        other.open()
        for _ in range(5):
            with pytest.raises(ScoringError, match="scripted"):
                await worker.submit(["bad"])
        assert len(one.batches) == len(other.batches) == 5
        results = await asyncio.gather(*(worker.submit([item]) for item in ("a", "bad", "cc")), return_exceptions=True)
        assert (results[0], results[2]) == ([1], [2])
        assert isinstance(results[1], ScoringError)
    assert "gets no more work" not in caplog.text


async def test_what_waits_for_a_device_that_is_given_up_meanwhile_is_answered() -> None:
    async with running() as ((one, other), worker):
        bad = await submitted(worker, "bad")
        await one.entered()
        good = await submitted(worker, "b", "bb", "bbb", "bbbb")
        await other.entered()
        other.broken = True
        one.open()
        for turn in range(7):  # all four, the first two, each of them, the last two, each of them
            other.allow()
            if turn < 6:
                await other.entered()
            for _ in range(9):
                await asyncio.sleep(0)  # what failed here is scored there
        async with asyncio.timeout(WAIT_S):
            assert await good == [1, 2, 3, 4]
            with pytest.raises(ScoringError, match="scripted"):
                await bad
        assert "bad" not in str(other.batches), "it was given up before"


async def test_the_last_device_is_never_given_up() -> None:
    async with running(1) as ((only,), worker):
        only.broken = True
        only.open()
        for _ in range(5):
            with pytest.raises(ScoringError, match="scripted"):
                await worker.submit(["a"])
        only.broken = False
        assert await worker.submit(["a"]) == [1]


async def test_closing_answers_whoever_is_on_any_device_or_waits() -> None:
    async with running(max_batch_size=1) as (devices, worker):
        tasks = [await submitted(worker, item) for item in ("a", "b", "c")]
        for device in devices:
            await device.entered()
        await worker.aclose()
        for task in tasks:
            with pytest.raises(ScoringError, match="closed"):
                await task


class TestWhenIdle:
    async def test_it_waits_until_nothing_is_left_to_score(self) -> None:
        done: list[int] = []

        async def job(device: int) -> None:
            done.append(device)

        async with running(1, max_batch_size=1) as ((device,), worker):
            first = await submitted(worker, "a")
            idle = asyncio.create_task(worker.when_idle(job, None))
            second = await submitted(worker, "b")
            device.allow()
            await first
            await device.entered()
            await device.entered()
            assert not done
            device.allow()
            await asyncio.gather(second, idle)
            assert done == [0]

    async def test_scoring_waits_for_one_that_has_begun(self) -> None:
        begun, end = asyncio.Event(), asyncio.Event()

        async def job(device: int) -> None:
            begun.set()
            await end.wait()

        async with running(1) as ((device,), worker):
            device.open()
            idle = asyncio.create_task(worker.when_idle(job, None))
            await begun.wait()
            scoring = await submitted(worker, "a")
            idle.cancel()
            assert not device.batches, "what runs is let end"
            end.set()
            assert await scoring == [1]
            await asyncio.gather(idle, return_exceptions=True)

    async def test_it_goes_where_its_beginning_is_known(self) -> None:
        done: list[int] = []

        async def job(device: int) -> None:
            done.append(device)

        async with running(3) as (devices, worker):
            for device in devices:
                device.open()
            for item in ("a", "b", "c"):
                await worker.submit([item])
            for key in ("c", "a", "b", "a"):
                await worker.when_idle(job, key)
            assert done == [2, 0, 1, 0]

    async def test_cancelled_before_it_began_it_never_begins(self) -> None:
        done: list[int] = []

        async def job(device: int) -> None:
            done.append(device)

        async with running(1) as ((device,), worker):
            scoring = await submitted(worker, "a")
            idle = asyncio.create_task(worker.when_idle(job, None))
            await asyncio.sleep(0)
            idle.cancel()
            device.open()
            await scoring
            await asyncio.wait({idle})
            await worker.submit(["a"])
            assert not done

    async def test_its_failure_is_its_callers(self) -> None:
        async def job(device: int) -> None:
            raise ValueError("scripted")

        async with running(1) as ((device,), worker):
            device.open()
            with pytest.raises(ValueError, match="scripted"):
                await worker.when_idle(job, None)
            assert await worker.submit(["a"]) == [1]

    @pytest.mark.parametrize("begins", [True, False])
    async def test_closing_answers_it(self, begins: bool) -> None:
        begun = asyncio.Event()

        async def job(device: int) -> None:
            begun.set()
            await asyncio.Event().wait()

        async with running(1) as ((device,), worker):
            scoring = None if begins else await submitted(worker, "a")
            idle = asyncio.create_task(worker.when_idle(job, None))
            await (begun.wait() if begins else device.entered())
            await worker.aclose()
            with pytest.raises(ScoringError, match="closed"):
                await idle
            with pytest.raises(ScoringError, match="closed"):
                await worker.when_idle(job, None)
            await asyncio.gather(*([scoring] if scoring else []), return_exceptions=True)
