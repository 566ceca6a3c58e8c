"""Work and the client who waits for it: whichever ends first, both end. And what bodies may hold. No clocks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
from prometheus_client import CollectorRegistry

from proxy.admission import Admission, ClientGoneError, client_left, while_client_waits
from proxy.config import ServerSettings
from proxy.errors import BodyTooLargeError, OverloadedError
from proxy.metrics import ProxyMetrics


class Client:
    """Leaves when told."""

    def __init__(self) -> None:
        self.gone = asyncio.Event()

    async def receive(self) -> dict[str, str]:
        await self.gone.wait()
        return {"type": "http.disconnect"}


async def test_work_that_ends_is_waited_for() -> None:
    done = []

    async def work() -> None:
        await asyncio.sleep(0)
        done.append(True)

    await while_client_waits(client_left(Client().receive), work())
    assert done == [True]


async def test_a_client_that_leaves_cancels_the_work() -> None:
    client, started, cancelled = Client(), asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    waiting = asyncio.create_task(while_client_waits(client_left(client.receive), work()))
    await started.wait()
    client.gone.set()
    with pytest.raises(ClientGoneError):
        await waiting
    assert cancelled.is_set()


async def test_what_work_raises_comes_through() -> None:
    async def work() -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        await while_client_waits(client_left(Client().receive), work())


async def test_both_end_when_the_server_stops() -> None:
    started, cancelled = asyncio.Event(), asyncio.Event()

    async def work() -> None:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            cancelled.set()

    before = asyncio.all_tasks()
    waiting = asyncio.create_task(while_client_waits(client_left(Client().receive), work()))
    await started.wait()
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    assert cancelled.is_set()
    assert asyncio.all_tasks() == before, "nothing is left running"


class Body:
    """A request body whose pieces the test hands over."""

    def __init__(self, *sizes: int) -> None:
        self.num_taken = 0
        self._pieces = self._messages(sizes)

    async def _messages(self, sizes: tuple[int, ...]) -> AsyncIterator[dict[str, Any]]:
        for position, size in enumerate(sizes, start=1):
            self.num_taken += 1
            yield {"type": "http.request", "body": b"x" * size, "more_body": position < len(sizes)}
        yield {"type": "http.disconnect"}

    async def receive(self) -> dict[str, Any]:
        return await anext(self._pieces)


class TestBodiesInMemory:
    @pytest.fixture
    def admission(self) -> Admission:
        settings = ServerSettings(max_buffered_body_bytes=2000, max_body_bytes=3000)
        return Admission(settings, ProxyMetrics(CollectorRegistry(), "0"))

    async def test_together_they_have_a_limit(self, admission: Admission) -> None:
        with admission.admit() as first:
            assert len(await first.read_body(Body(900, 900).receive)) == 1800
            with admission.admit() as second, pytest.raises(OverloadedError) as caught:
                await second.read_body(Body(100, 101).receive)
            assert caught.value.error_code == "max_buffered_body_bytes"
            assert caught.value.headers == {"retry-after": "1", "connection": "close"}
            # What was refused holds nothing.
            with admission.admit() as third:
                assert len(await third.read_body(Body(200).receive)) == 200
        with admission.admit() as fourth:
            assert len(await fourth.read_body(Body(1900).receive)) == 1900

    async def test_what_is_announced_is_refused_unread_and_holds_nothing(self, admission: Admission) -> None:
        with admission.admit() as first, admission.admit() as second, admission.admit() as third:
            await first.read_body(Body(1000).receive)
            body = Body(1001)
            with pytest.raises(OverloadedError):
                await second.read_body(body.receive, {"content-length": "1001"})
            assert body.num_taken == 0
            # Announced, and not sent.
            with pytest.raises(ClientGoneError):
                await second.read_body(Body().receive, {"content-length": "1000"})
            assert len(await third.read_body(Body(1000).receive)) == 1000

    async def test_alone_a_body_may_be_as_large_as_any(self, admission: Admission) -> None:
        with admission.admit() as place:
            assert len(await place.read_body(Body(1500, 1500).receive)) == 3000
        with admission.admit() as place, pytest.raises(BodyTooLargeError):
            await place.read_body(Body(1500, 1501).receive)

    async def test_of_several_being_read_one_gives_way_to_the_others(self, admission: Admission) -> None:
        halfway, goes_on = asyncio.Event(), asyncio.Event()

        async def slow() -> dict[str, Any]:
            if not halfway.is_set():
                halfway.set()
                return {"type": "http.request", "body": b"x" * 1000, "more_body": True}
            await goes_on.wait()
            return {"type": "http.request", "body": b"x" * 1000, "more_body": False}

        async def read() -> bytes:
            with admission.admit() as place:
                return await place.read_body(slow)

        reading = asyncio.create_task(read())
        await halfway.wait()
        with admission.admit() as other:
            await other.read_body(Body(1000).receive)
            goes_on.set()
            with pytest.raises(OverloadedError):
                await reading
