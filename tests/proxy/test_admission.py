"""Work and the client who waits for it: whichever ends first, both end. Explicit events, no clocks."""

from __future__ import annotations

import asyncio

import pytest

from proxy.admission import ClientGoneError, client_left, while_client_waits


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
