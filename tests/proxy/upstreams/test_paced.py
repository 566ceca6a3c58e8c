"""Calls in bulk keep their pace, and wait together where one was told to wait."""

from __future__ import annotations

import asyncio

import pytest

from proxy.upstreams.base import UpstreamCall, UpstreamResponse
from proxy.upstreams.local_answers import LocalResponse
from proxy.upstreams.paced import PacedUpstream


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    async def sleep(self, seconds: float) -> None:
        self.now += seconds


class Timed:
    """Notes when calls come."""

    name = "timed"

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.at: list[float] = []

    async def open(self) -> None: ...

    async def aclose(self) -> None: ...

    async def ready(self) -> bool:
        return True

    async def send(self, call: UpstreamCall) -> UpstreamResponse:
        self.at.append(self._clock.now)
        return LocalResponse(200, b"{}")


async def calls(per_minute: float | None, *, held_s: float = 0.0) -> list[float]:
    clock = Clock()
    timed = Timed(clock)
    paced = PacedUpstream(timed, per_minute, clock, clock.sleep)
    paced.hold(held_s)
    await asyncio.gather(*(paced.send(UpstreamCall("POST", "/chat/completions")) for _ in range(4)))
    return [at - 100.0 for at in timed.at]


async def test_calls_are_spread_evenly() -> None:
    assert await calls(30) == pytest.approx([0, 2, 4, 6])


async def test_without_a_pace_they_go_at_once() -> None:
    assert await calls(None) == [0, 0, 0, 0]


async def test_a_hold_is_for_all() -> None:
    assert await calls(None, held_s=5) == [5, 5, 5, 5]
    assert await calls(60, held_s=5) == pytest.approx([5, 6, 7, 8])
