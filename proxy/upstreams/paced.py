"""Calls to an upstream at a steady pace, for work in bulk: so many a minute, and none while it asks for patience."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from proxy.quotas import Bucket, Clock
from proxy.upstreams.base import Upstream, UpstreamCall, UpstreamResponse


class PacedUpstream:
    """An `Upstream` around another. Calls past the pace wait in the order of asking."""

    def __init__(
        self,
        upstream: Upstream,
        calls_per_minute: float | None,
        clock: Clock,
        sleep: Callable[[float], Awaitable[object]] = asyncio.sleep,
    ) -> None:
        """`clock` is in seconds, that of the loop."""
        self._upstream = upstream
        # One at a time, evenly: a minute's worth at once is what makes a provider refuse.
        self._bucket = None if calls_per_minute is None else Bucket(1, clock, 60 / calls_per_minute)
        self._clock = clock
        self._sleep = sleep
        self._held_until = clock()
        self._turn = asyncio.Lock()

    @property
    def name(self) -> str:
        return self._upstream.name

    def hold(self, seconds: float) -> None:
        """Begins no call for so long: what one call was told holds for all."""
        self._held_until = max(self._held_until, self._clock() + seconds)

    async def open(self) -> None:
        await self._upstream.open()

    async def send(self, call: UpstreamCall) -> UpstreamResponse:
        """As `Upstream.send`, when it is time."""
        async with self._turn:
            while (wait_s := self._wait_s()) > 0:
                await self._sleep(wait_s)
            if self._bucket is not None:
                self._bucket.take(1)
        return await self._upstream.send(call)

    async def ready(self) -> bool:
        return await self._upstream.ready()

    async def aclose(self) -> None:
        await self._upstream.aclose()

    def _wait_s(self) -> float:
        held_s = max(0.0, self._held_until - self._clock())
        return held_s if self._bucket is None else max(held_s, self._bucket.wait_s(1))
