"""The configuration at work, and its replacement while requests run.

A reload is atomic: what is new is opened first, and when something of it cannot be, nothing has changed. Requests end
with the gateway they began with; what only that one used is closed after the last of them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import dataclass, field

from proxy.gateway import Gateway
from proxy.recorder import Recorder
from proxy.upstreams.base import Upstream
from reward.scorer import Scorer

_log = logging.getLogger(__name__)

_Part = Upstream | Scorer | Recorder


@dataclass(eq=False, slots=True)
class _Generation:
    gateway: Gateway
    requests: int = 0
    idle: asyncio.Event = field(default_factory=asyncio.Event)
    """Set when it was replaced and its last request has ended."""
    replaced: bool = False

    def leave(self) -> None:
        self.requests -= 1
        self.settle()

    def settle(self) -> None:
        if self.replaced and self.requests == 0:
            self.idle.set()


class Live:
    """Lives as long as the server. Not for several event loops."""

    def __init__(self, gateway: Gateway) -> None:
        self._current = _Generation(gateway)
        self._opened: list[_Generation] = []
        """The current generation and those that still have requests."""
        self._retiring: set[asyncio.Task[None]] = set()

    @property
    def gateway(self) -> Gateway:
        return self._current.gateway

    @contextlib.contextmanager
    def enter(self) -> Iterator[Gateway]:
        """The gateway for one request: nothing it uses is closed before the request has left."""
        generation = self._current
        generation.requests += 1
        try:
            yield generation.gateway
        finally:
            generation.leave()

    async def open(self) -> None:
        """Raises what a part raises that cannot be opened; the others are closed again."""
        await self._open(self._current)

    async def replace(self, gateway: Gateway) -> None:
        """Puts `gateway` in the current one's place. Raises what a part of it raises; then nothing has changed."""
        new = _Generation(gateway)
        await self._open(new)
        before, self._current = self._current, new
        gateway.admission.settings = gateway.settings.server
        gateway.joining.max_lingering = gateway.settings.server.max_lingering
        before.replaced = True
        before.settle()
        task = asyncio.create_task(self._retire(before))
        self._retiring.add(task)
        task.add_done_callback(self._retiring.discard)

    async def aclose(self) -> None:
        """Closes everything, whether or not requests still run."""
        for task in self._retiring:
            task.cancel()
        await asyncio.gather(*self._retiring, return_exceptions=True)
        while self._opened:
            await self._close(self._opened.pop())

    async def _open(self, generation: _Generation) -> None:
        opened: list[_Part] = []
        try:
            for part, open_ in _parts(generation.gateway):
                if not self._uses(part):
                    opened.append(part)
                    await open_()
        except BaseException:
            await _close_all(opened)
            raise
        self._opened.append(generation)

    async def _retire(self, generation: _Generation) -> None:
        await generation.idle.wait()
        self._opened.remove(generation)
        await self._close(generation)

    async def _close(self, generation: _Generation) -> None:
        await _close_all([part for part, _ in _parts(generation.gateway) if not self._uses(part)])

    def _uses(self, part: _Part) -> bool:
        return any(part is other for generation in self._opened for other, _ in _parts(generation.gateway))


def _parts(gateway: Gateway) -> Iterator[tuple[_Part, Callable[[], Awaitable[None]]]]:
    """Everything to open, in that order, with what opens it."""
    for scorer in gateway.scorers.values():
        yield scorer, scorer.start
    for upstream in gateway.upstreams.values():
        yield upstream, upstream.open
    if gateway.recorder is not None:
        yield gateway.recorder, gateway.recorder.start


async def _close_all(parts: Sequence[_Part]) -> None:
    """All of them, the last opened first, whatever one of them raises."""
    for part in reversed(parts):
        try:
            await part.aclose()
        except Exception:  # a part's end must not keep the next from its own
            _log.exception("Closing %s failed", part.name)
