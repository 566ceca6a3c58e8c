"""The recorder's promises: it never blocks, it is bounded, it counts what it drops, and it ends in time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from feedback.judgements import Judgement, RefusedError, StoreError
from feedback.redaction import Redactor
from proxy.metrics import ProxyMetrics
from proxy.recorder import Recorder, RecorderLimits
from tests.fakes.store import FakeStore
from tests.feedback.conftest import candidate_set

Metric = Callable[..., float]


@asynccontextmanager
async def recording(store: FakeStore, **limits: Any) -> AsyncIterator[tuple[Recorder, Metric]]:
    registry = CollectorRegistry()
    recorder = Recorder(store, Redactor(), RecorderLimits(**limits), ProxyMetrics(registry, "0"))
    await recorder.start()
    try:
        yield recorder, lambda name, **labels: registry.get_sample_value(name, labels) or 0.0
    finally:
        store.may_write.set()
        await recorder.aclose()
        assert store.closed


def record(recorder: Recorder, *numbers: int) -> None:
    for number in numbers:
        recorder.record([candidate_set(f"winnow-{number}")], 100)


async def test_closing_writes_what_waits_and_redacts_it() -> None:
    store = FakeStore()
    async with recording(store) as (recorder, metric):
        recorder.record([candidate_set("winnow-1", "mail a@b.de")], 100)
        record(recorder, *range(2, 12))
    assert len(store.sets) == 11 and store.sets["winnow-1"].candidates[0].message["content"] == "mail [EMAIL]"
    assert metric("winnow_recorder_written_total") == 11
    assert metric("winnow_recorder_queue_depth") == 0


async def test_what_waits_goes_in_batches() -> None:
    store = FakeStore()
    async with recording(store, max_batch=4) as (recorder, _):
        store.may_write.clear()
        record(recorder, 0)
        await asyncio.to_thread(store.writing.wait, 20)
        record(recorder, *range(1, 10))
    assert store.batches == [1, 4, 4, 1]


async def test_a_full_queue_drops_and_counts_and_never_blocks() -> None:
    store = FakeStore()
    async with recording(store, max_queue=3) as (recorder, metric):
        store.may_write.clear()
        record(recorder, 0)
        await asyncio.to_thread(store.writing.wait, 20)
        record(recorder, *range(1, 1001))
        assert metric("winnow_recorder_dropped_total", reason="queue_full") == 997
    assert set(store.sets) == {"winnow-0", "winnow-1", "winnow-2", "winnow-3"}


async def test_large_sets_are_bounded_by_their_size() -> None:
    store = FakeStore()
    async with recording(store, max_queue_bytes=1000) as (recorder, metric):
        store.may_write.clear()
        recorder.record([candidate_set("winnow-0"), candidate_set("winnow-0.1")], 900)
        recorder.record([candidate_set("winnow-1")], 101)
        assert metric("winnow_recorder_dropped_total", reason="queue_full") == 1
        recorder.record([candidate_set("winnow-2")], 100)
    assert set(store.sets) == {"winnow-0", "winnow-0.1", "winnow-2"}


async def test_a_store_that_comes_back_gets_everything() -> None:
    store = FakeStore()
    store.failures = 3  # of the first opening, and of two tries
    async with recording(store) as (recorder, metric):
        assert metric("winnow_recorder_failures_total") == 1
        record(recorder, 1, 2)
    assert set(store.sets) == {"winnow-1", "winnow-2"}
    assert metric("winnow_recorder_failures_total") == 3
    assert metric("winnow_recorder_dropped_total", reason="store") == 0


async def test_a_store_that_stays_away_costs_sets_not_time() -> None:
    store = FakeStore()
    store.failures = 10_000
    async with recording(store, retry_s=0.15, flush_s=0.2) as (recorder, metric):
        record(recorder, 1, 2)
    assert not store.sets
    assert metric("winnow_recorder_dropped_total", reason="store") == 2


async def test_a_set_that_cannot_be_written_does_not_end_the_thread() -> None:
    class Broken(FakeStore):
        def add_sets(self, sets: Any) -> None:
            if sets[0].completion_id == "winnow-1":
                raise TypeError("a bug")
            super().add_sets(sets)

    store = Broken()
    async with recording(store, max_batch=1) as (recorder, metric):
        record(recorder, 1, 2)
    assert set(store.sets) == {"winnow-2"}
    assert metric("winnow_recorder_dropped_total", reason="error") == 1


@pytest.mark.parametrize("problem", [TypeError("a bug"), RefusedError("too large")])
async def test_a_set_that_is_refused_costs_none_that_came_with_it(problem: Exception) -> None:
    class Picky(FakeStore):
        def add_sets(self, sets: Any) -> None:
            if any(one.completion_id == "winnow-2" for one in sets):
                raise problem
            super().add_sets(sets)

    store = Picky()
    store.may_write.clear()
    async with recording(store, retry_s=60, flush_s=60) as (recorder, metric):
        record(recorder, 0)
        await asyncio.to_thread(store.writing.wait, 20)
        record(recorder, 1, 2, 3)
        store.may_write.set()
    assert set(store.sets) == {"winnow-0", "winnow-1", "winnow-3"}
    assert metric("winnow_recorder_dropped_total", reason="error") == 1
    assert metric("winnow_recorder_failures_total") == 0, "nothing was tried again"


async def test_a_judgement_does_not_wait_for_the_queue() -> None:
    store = FakeStore()
    async with recording(store) as (recorder, _):
        store.may_write.clear()
        recorder.record([candidate_set("winnow-1", "mail a@b.de")], 100)
        assert await recorder.candidate_set("winnow-1") is not None
        await recorder.judge(Judgement("winnow-1", comment="c@d.de"))
        assert store.said[0].judgement.comment == "[EMAIL]"
        assert "a@b.de" not in str(store.sets["winnow-1"])
        assert await recorder.candidate_set("winnow-2") is None
        store.failures = 1
        with pytest.raises(StoreError):
            await recorder.judge(Judgement("winnow-1", rating=1))


async def test_a_set_that_another_process_is_writing_is_looked_for_twice() -> None:
    class Late(FakeStore):
        looks = 0

        def candidate_set(self, completion_id: str) -> Any:
            self.looks += 1
            return candidate_set(completion_id) if self.looks == 2 else None

    async with recording(Late(), second_look_s=0.01) as (recorder, _):
        assert await recorder.candidate_set("winnow-1") == candidate_set("winnow-1")


async def test_after_the_end_nothing_is_taken() -> None:
    store = FakeStore()
    async with recording(store) as (recorder, metric):
        pass
    record(recorder, 1)
    assert metric("winnow_recorder_dropped_total", reason="queue_full") == 1
