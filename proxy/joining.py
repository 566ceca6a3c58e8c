"""A client's own retry of a request that still runs joins it, instead of paying for all its candidates again.

Not for streams: what went out to a client that has left cannot be sent again.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Coroutine, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

from proxy.errors import RejectedError
from proxy.keys import CREDENTIAL_HEADERS

_Answer = TypeVar("_Answer")

_RETRY_COUNT = "x-stainless-retry-count"
_IDEMPOTENCY_KEY = "idempotency-key"
_PART_OF_THE_REQUEST = CREDENTIAL_HEADERS | {_IDEMPOTENCY_KEY, "openai-organization", "openai-project", "openai-beta"}
_OURS = "x-winnow-"


class StillAtWorkError(Exception):
    """The work takes longer than somebody would wait for it."""


def may_come_again(headers: Mapping[str, str]) -> bool:
    """A client that would say so, if it sent this request a second time."""
    return _RETRY_COUNT in headers or _IDEMPOTENCY_KEY in headers


def comes_again(headers: Mapping[str, str]) -> bool:
    """The client says that it may have sent this request before."""
    return headers.get(_RETRY_COUNT, "0") != "0" or _IDEMPOTENCY_KEY in headers


def fingerprint(path: str, query: str, headers: Mapping[str, str], body: bytes, also: Iterable[str] = ()) -> bytes:
    """The same for two requests only if whoever may read the answer to one may read that to the other.

    `also`: names, in lower case, of more headers that go upstream: they may say there whose request it is.
    """
    digest = hashlib.sha256(body)
    decisive = _PART_OF_THE_REQUEST.union(also)
    for name in sorted(headers):
        if name in decisive or name.startswith(_OURS):
            digest.update(f"\0{name}\0{headers[name]}".encode("utf-8", "surrogateescape"))
    digest.update(f"\0{path}\0{query}".encode("utf-8", "surrogateescape"))
    return digest.digest()


@dataclass(frozen=True, slots=True)
class Linger:
    """Seconds that work goes on, and its answer is kept, when nobody waits for it any more."""

    after_leaving_s: float = 0.0
    after_deadline_s: float = 0.0


class Shared(Generic[_Answer]):
    """The work for one request, awaited by one client or more."""

    def __init__(self, joining: Joining, key: bytes, work: Coroutine[Any, Any, _Answer], linger: Linger) -> None:
        self._joining = joining
        self.key = key
        self._linger = linger
        self._num_waiting = 0
        self._end: asyncio.TimerHandle | None = None
        self.task = asyncio.create_task(work)
        self.task.add_done_callback(self._ended)

    async def wait(self, patience_s: float | None = None) -> _Answer:
        """The work's answer, or what it raised.

        Raises `StillAtWorkError` after `patience_s`. Then, and cancelled, it ends the work, unless others wait or it
        lingers.
        """
        self._num_waiting += 1
        self._joining.stays(self)
        try:
            done, _ = await asyncio.wait((self.task,), timeout=patience_s)
        except asyncio.CancelledError:
            await self._leave(self._linger.after_leaving_s)
            raise
        if not done:
            await self._leave(self._linger.after_deadline_s)
            raise StillAtWorkError
        self._joining.drop(self)
        return self.task.result()

    async def give_up(self) -> None:
        """Nobody wants the answer: ends the work, and returns when it has ended."""
        self._joining.drop(self)
        self.task.cancel()
        await asyncio.wait((self.task,))

    def linger(self, for_s: float) -> None:
        self._end = asyncio.get_running_loop().call_later(for_s, self.expire)

    def expire(self) -> None:
        self._joining.drop(self)
        self.task.cancel()

    def stop_timer(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None

    async def _leave(self, linger_s: float) -> None:
        """One that waited has gone."""
        self._num_waiting -= 1
        if self._num_waiting > 0:
            return
        if self._has_failed or linger_s == 0 or not self._joining.lingers(self, linger_s):
            await self.give_up()

    def _ended(self, _: asyncio.Task[_Answer]) -> None:
        # Whoever waits gets what it raised. A retry that comes later tries anew, rather than fail of what is past.
        if self._has_failed and self._num_waiting == 0:
            self._joining.drop(self)

    @property
    def _has_failed(self) -> bool:
        """It raised something. A rejection is an answer: its candidates are there, and paid for."""
        if not self.task.done() or self.task.cancelled():
            return False
        error = self.task.exception()
        return error is not None and not isinstance(error, RejectedError)


@dataclass(frozen=True, slots=True)
class Sharing:
    """One request that joins another, or may be joined."""

    joining: Joining
    key: bytes
    found: Shared[Any] | None

    @property
    def joins(self) -> bool:
        return self.found is not None

    async def answer(
        self, work: Callable[[], Coroutine[Any, Any, _Answer]], linger: Linger, patience_s: float | None = None
    ) -> _Answer:
        """As `Shared.wait`."""
        # It may have come to its end since it was found.
        if self.found is not None and self.joining.find(self.key) is self.found:
            return cast("_Answer", await self.found.wait(patience_s))
        return await self.joining.begin(self.key, work(), linger).wait(patience_s)


class Joining:
    """The requests that another could join. Lives as long as the server; keeps nothing of those that were answered."""

    def __init__(self, max_lingering: int) -> None:
        self.max_lingering = max_lingering
        self._shared: dict[bytes, Shared[Any]] = {}
        self._lingering: set[Shared[Any]] = set()

    def __len__(self) -> int:
        return len(self._shared)

    def sharing(
        self, path: str, query: str, headers: Mapping[str, str], body: bytes, also: Iterable[str] = ()
    ) -> Sharing | None:
        """One request's part in this; None where its client could not say that it comes again. As `fingerprint`."""
        if not may_come_again(headers):
            return None
        key = fingerprint(path, query, headers, body, also)
        return Sharing(self, key, self.find(key) if comes_again(headers) else None)

    def find(self, key: bytes) -> Shared[Any] | None:
        """The work for the same request, running or waiting to be fetched."""
        return self._shared.get(key)

    def begin(self, key: bytes, work: Coroutine[Any, Any, _Answer], linger: Linger) -> Shared[_Answer]:
        """Starts the work. The latest of equal requests is the one that can be joined."""
        shared = Shared(self, key, work, linger)
        self._shared[key] = shared
        return shared

    def stays(self, shared: Shared[Any]) -> None:
        """Somebody waits for it."""
        shared.stop_timer()
        self._lingering.discard(shared)

    def lingers(self, shared: Shared[Any], for_s: float) -> bool:
        """Nobody waits for it, for now. False: too much lingers already, or something newer took its place."""
        if len(self._lingering) >= self.max_lingering or self._shared.get(shared.key) is not shared:
            return False
        self._lingering.add(shared)
        shared.linger(for_s)
        return True

    def drop(self, shared: Shared[Any]) -> None:
        shared.stop_timer()
        self._lingering.discard(shared)
        if self._shared.get(shared.key) is shared:
            del self._shared[shared.key]

    async def aclose(self) -> None:
        """Ends what lingers."""
        for shared in list(self._lingering):
            await shared.give_up()
