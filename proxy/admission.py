"""Saying no at the door, and noticing when the client leaves."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Coroutine, Iterator, Mapping
from types import MappingProxyType
from typing import Any

from starlette.types import Receive

from proxy.config import ServerSettings
from proxy.errors import BodyTooLargeError, OverloadedError
from proxy.metrics import ProxyMetrics

RETRY_AFTER_S = 1


class ClientGoneError(Exception):
    """The client closed its connection; nobody reads an answer any more."""


class Gate:
    """What all connections of one server share, and `/readyz` and the drain with them."""

    def __init__(self, settings: ServerSettings, metrics: ProxyMetrics) -> None:
        self.settings = settings
        self.draining = False
        """The server is about to stop: not ready for more, and connections close after the answer they wait for."""
        self._metrics = metrics

    def count_refused(self, reason: str) -> None:
        """A connection was refused or cut before or after its requests reached the application."""
        self._metrics.connections_refused.labels(reason).inc()


class Admission:
    """Counts requests being worked on, and what their bodies hold, and refuses what is too much before any work."""

    def __init__(self, settings: ServerSettings, metrics: ProxyMetrics) -> None:
        self.settings = settings
        self._metrics = metrics
        self._in_flight = 0
        self._body_bytes = 0

    @contextlib.contextmanager
    def admit(self) -> Iterator[Place]:
        """Holds a place, and what is read by it, until the request's end. Raises `OverloadedError`."""
        if self._in_flight >= self.settings.max_in_flight:
            raise OverloadedError(
                f"The server is working on {self._in_flight} requests, as many as it takes. Try again later",
                headers={"retry-after": str(RETRY_AFTER_S)},
            )
        self._in_flight += 1
        self._metrics.in_flight.set(self._in_flight)
        place = Place(self)
        try:
            yield place
        finally:
            self._body_bytes -= place.body_bytes
            self._in_flight -= 1
            self._metrics.in_flight.set(self._in_flight)

    def hold(self, size: int, place: Place) -> None:
        """Counts so many more bytes of the place's body. Raises `OverloadedError`."""
        self.check(size, place)
        self._body_bytes += size
        place.body_bytes += size

    def check(self, size: int, place: Place) -> None:
        """Whether so many more bytes may come. Alone, a body may be as large as any. Raises `OverloadedError`."""
        most = self.settings.max_buffered_body_bytes
        if self._body_bytes + size > most and self._body_bytes > place.body_bytes:
            raise OverloadedError(
                f"The bodies of running requests hold {self._body_bytes} bytes, and may hold {most} together. "
                "Try again later",
                code="max_buffered_body_bytes",
                # The rest is not read, so the connection cannot serve another request.
                headers={"retry-after": str(RETRY_AFTER_S), "connection": "close"},
            )


class Place:
    """One request's, among those being worked on."""

    __slots__ = ("_admission", "body_bytes")

    def __init__(self, admission: Admission) -> None:
        self._admission = admission
        self.body_bytes = 0
        """Read so far, and in memory."""

    async def read_body(self, receive: Receive, headers: Mapping[str, str] = MappingProxyType({})) -> bytes:
        """The whole request body. Raises `BodyTooLargeError`, `OverloadedError`, `ClientGoneError`.

        `headers` (lower-case names) may announce a body that is too large: then none of it is read. What is announced
        counts only as it comes, or a few clients that send nothing would keep all others out.
        """
        max_bytes = self._admission.settings.max_body_bytes
        announced = headers.get("content-length", "")
        if announced.isdecimal():
            size = int(announced[:20])
            if size > max_bytes:
                raise _too_large(max_bytes)
            self._admission.check(size, self)
        pieces: list[bytes] = []
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGoneError
            piece = message.get("body", b"")
            if self.body_bytes + len(piece) > max_bytes:
                raise _too_large(max_bytes)
            self._admission.hold(len(piece), self)
            if not message.get("more_body", False):
                return b"".join([*pieces, piece]) if pieces else piece
            pieces.append(piece)


def _too_large(max_bytes: int) -> BodyTooLargeError:
    # The rest is not read, so the connection cannot serve another request.
    return BodyTooLargeError(f"The body is over {max_bytes} bytes", headers={"connection": "close"})


async def client_left(receive: Receive) -> None:
    """Returns when the client has closed its connection. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def while_client_waits(departure: Coroutine[Any, Any, None], work: Coroutine[Any, Any, None]) -> None:
    """Runs `work`, and cancels it as soon as `departure` returns: then raises `ClientGoneError`.

    A plain handler is not cancelled when its client hangs up; a task beside it does it. Whatever `work` raises comes
    through, and so does what `departure` raises, which must not wait for anything once it is cancelled. Both have ended
    when this returns, also when it is cancelled itself.
    """
    working = asyncio.current_task()
    assert working is not None
    watching = asyncio.create_task(departure)
    cancelled_before = working.cancelling()
    is_done = was_left = False

    def leave(_: asyncio.Task[None]) -> None:
        nonlocal was_left
        if not is_done and not watching.cancelled():
            was_left = True
            working.cancel()

    # Cancelling the running task, as `asyncio.timeout` does, spares every request a task of its own for `work`.
    watching.add_done_callback(leave)
    try:
        await work
    except asyncio.CancelledError:
        if was_left and working.uncancel() <= cancelled_before:
            watching.result()
            raise ClientGoneError from None
        raise
    finally:
        is_done = True
        watching.cancel()
        # Its turn comes before ours: cancelled, it ends there.
        await asyncio.sleep(0)
