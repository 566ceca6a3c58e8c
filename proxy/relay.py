"""One upstream call passed on to the client: bytes as they come, tried again while none of them was sent."""

from __future__ import annotations

import asyncio
import functools
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import orjson
from starlette.types import Send

from proxy.candidates import ENDPOINT_PATHS, CallEnd, CallFailure
from proxy.errors import DeadlineError, UpstreamFailedError, envelope
from proxy.headers import Headers, from_upstream, raw, relayed
from proxy.metering import Meter
from proxy.recording import is_event_stream, passable, status_failure, usage_of
from proxy.responses_events import error_payload, next_number
from proxy.sse import event, named_event
from proxy.upstreams.base import UpstreamCall, UpstreamError
from proxy.upstreams.guarded import GuardedResponse, GuardedUpstream
from proxy.upstreams.retries import RetryBudget

_log = logging.getLogger(__name__)

Expected = Literal["object", "stream", "anything"]
"""What a good answer is: a JSON object, an event stream (or an object, from servers that do not stream), or whatever
comes. What is expected is waited for before the client gets a byte, so that a failure can still be mended."""


class CutAnswerError(Exception):
    """The upstream broke off in the middle of an answer: the client's connection must be cut, not ended."""


@dataclass(frozen=True, slots=True)
class WholeAnswer:
    """An answer that is all there."""

    status: int
    headers: Headers
    body: bytes
    num_attempts: int
    upstream_s: float
    usage: Mapping[str, Any] | None = None
    """The upstream's bill, where it wrote one."""
    fallback: str | None = None
    """The route that stood in for the one that was asked for."""

    async def send(self, send: Send, extra: Mapping[str, str]) -> float:
        """Returns the seconds spent upstream."""
        length = (b"content-length", str(len(self.body)).encode())
        await send({
            "type": "http.response.start", "status": self.status, "headers": [*self.headers, length, *raw(extra)]
        })  # fmt: skip
        await send({"type": "http.response.body", "body": self.body})
        return self.upstream_s


@dataclass(frozen=True, slots=True)
class LiveAnswer:
    """An answer that is still arriving. `send` closes it, and must be called at once."""

    response: GuardedResponse
    first: bytes
    rest: AsyncIterator[bytes]
    num_attempts: int
    sent_at: float
    """Of `time.perf_counter`."""
    fallback: str | None = None
    typed: bool = False
    """Its events are those of the Responses API."""
    meter: Meter | None = None
    """Sees what goes by, and hears how it ended."""

    async def send(self, send: Send, extra: Mapping[str, str]) -> float:
        """Returns the seconds spent upstream. Raises `CutAnswerError`."""
        try:
            head = relayed(self.response.headers) + raw(extra)
            await send({"type": "http.response.start", "status": self.response.status, "headers": head})
            await self._pass_on(send)
        finally:
            await self.response.aclose()
            self._ended("cancelled")
        return time.perf_counter() - self.sent_at

    def _ended(self, how: CallEnd) -> None:
        """The first word counts."""
        if self.meter is not None:
            self.meter.end(how, time.perf_counter() - self.sent_at)

    async def _pass_on(self, send: Send) -> None:
        before, last = b"", self.first
        try:
            if self.first:
                if self.meter is not None:
                    self.meter.see(self.first)
                await send({"type": "http.response.body", "body": self.first, "more_body": True})
            async for piece in self.rest:
                if self.meter is not None:
                    self.meter.see(piece)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
                before, last = last, piece
        except UpstreamError as error:
            self._ended("lost")
            if not is_event_stream({name.lower(): value for name, value in self.response.headers.items()}):
                raise CutAnswerError(str(error)) from error
            # A stream that merely ends looks whole to clients: they get an error event, and no `[DONE]`.
            _log.warning("A stream broke off: %s", error)
            problem = self._problem(str(error), f"upstream_{error.reason}", before + last)
            # The cut may have come in the middle of a line: a blank line first ends whatever was open.
            await send({"type": "http.response.body", "body": b"\n\n" + problem, "more_body": True})
        else:
            self._ended("answered")
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _problem(self, message: str, code: str, sent: bytes) -> bytes:
        if self.typed:
            return named_event("error", error_payload(message, "upstream_error", code, None, next_number(sent)))
        return event(orjson.dumps(envelope(message, "upstream_error", code)))


Answer = WholeAnswer | LiveAnswer


@dataclass(frozen=True, slots=True)
class Relay:
    """Passes one client's request on."""

    upstream: GuardedUpstream
    budget: RetryBudget
    expected: Expected

    async def answer(self, call: UpstreamCall, deadline_s: float | None = None) -> Answer:
        """An answer to send. `deadline_s` is for the first byte of a stream, or the whole of anything else.

        Raises `UpstreamFailedError` and `DeadlineError`. An error answer to what may be anything is an answer.
        """
        deadline = None if deadline_s is None else asyncio.get_running_loop().time() + deadline_s
        try:
            async with asyncio.timeout_at(deadline):
                tried = await self.upstream.retrier.run(
                    lambda: self._attempt(call), _failure_of, self.budget, deadline=deadline
                )
        except TimeoutError as error:
            raise DeadlineError(f"The upstream did not answer within {deadline_s:g} s") from error
        outcome = tried.outcome
        if isinstance(outcome, _Failed):
            failure = self.upstream.retrier.for_client(outcome.failure, self.budget)
            if outcome.answer is None or self.expected != "anything":
                raise UpstreamFailedError(failure)
            outcome = replace(outcome.answer, headers=raw(failure.headers))
        return outcome if tried.num_attempts == 1 else replace(outcome, num_attempts=tried.num_attempts)

    async def _attempt(self, call: UpstreamCall) -> Answer | _Failed:
        try:
            place = await self.upstream.place()
            started = time.perf_counter()
            response = await place.send(call)
        except UpstreamError as error:
            return _Failed(CallFailure.of(error))
        live = False
        try:
            outcome = await self._received(response, started, call.path)
            live = isinstance(outcome, LiveAnswer)
            return outcome
        except UpstreamError as error:
            return _Failed(CallFailure.of(error))
        finally:
            if not live:
                await response.aclose()

    async def _received(self, response: GuardedResponse, sent_at: float, path: str) -> Answer | _Failed:
        lowered = {name.lower(): value for name, value in response.headers.items()}
        is_error = response.status >= 400 or (self.expected != "anything" and response.status >= 300)
        if not is_error and (self.expected == "anything" or (self.expected == "stream" and is_event_stream(lowered))):
            pieces = response.stream()
            first = b"" if self.expected == "anything" else await anext(pieces, b"")
            return LiveAnswer(response, first, pieces, 1, sent_at, typed=path == ENDPOINT_PATHS["responses"])
        body = await response.read()
        whole = functools.partial(
            WholeAnswer, response.status, raw(from_upstream(lowered)), body, 1, time.perf_counter() - sent_at
        )
        if is_error:
            return _Failed(status_failure(response, body, self.upstream.name), whole())
        read = passable(body, self.upstream.name)
        return _Failed(read) if isinstance(read, CallFailure) else whole(usage=usage_of(read))


@dataclass(frozen=True, slots=True)
class _Failed:
    failure: CallFailure
    answer: WholeAnswer | None = None
    """The upstream's own, where it answered with an error."""


def _failure_of(outcome: Answer | _Failed) -> CallFailure | None:
    return outcome.failure if isinstance(outcome, _Failed) else None
