"""Upstream answers into candidates: whole JSON answers, and streams folded into whole choices."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import orjson

from proxy.candidates import Call, CallFailure, Candidate, Endpoint
from proxy.chat_chunks import ChoiceFold, chunks_of
from proxy.choices import are_well_formed, is_well_formed, misshapen
from proxy.headers import from_upstream
from proxy.responses_events import ResponseFold, events_of
from proxy.responses_output import choice_of, failure_of, usage_in_chat_names
from proxy.sse import DONE, EventParser
from proxy.upstreams.base import UpstreamResponse
from proxy.upstreams.error_bodies import in_shape

_MESSAGE_CHARS = 300


def is_event_stream(headers: Mapping[str, str]) -> bool:
    return headers.get("content-type", "").partition(";")[0].strip().lower() == "text/event-stream"


def status_failure(response: UpstreamResponse, body: bytes, upstream: str) -> CallFailure:
    """An error answer as a value."""
    message = f"The upstream {upstream} answered {response.status}"
    if detail := _error_message(body):
        message += f": {detail}"
    headers = from_upstream({name.lower(): value for name, value in response.headers.items()})
    return CallFailure("status", message, response.status, body, headers)


@dataclass(frozen=True, slots=True)
class Answer:
    """One whole answer of an upstream."""

    frame: Mapping[str, Any]
    """The object around the choices. For the Responses API, which has none, the response itself."""
    choices: Sequence[Mapping[str, Any]]
    usage: Mapping[str, Any] | None
    """In chat's names, for every endpoint."""


def parse_answer(body: bytes, upstream: str, endpoint: Endpoint = "chat") -> Answer | CallFailure:
    """A whole answer, or why it is none."""
    answer = _object(body, upstream)
    if isinstance(answer, CallFailure):
        return answer
    if endpoint == "responses":
        # Here `error` is a member of every answer, null or not.
        if (failure := failure_of(answer, upstream)) is not None:
            return failure
        usage, choice = usage_of(answer), choice_of(answer)
        if not is_well_formed(choice):
            return misshapen(upstream)
        return Answer(answer, [choice], usage and usage_in_chat_names(usage))
    if (failure := _error_inside(answer, body, upstream)) is not None:
        return failure
    choices = answer.get("choices")
    if not isinstance(choices, list) or not choices:
        return CallFailure("malformed", f"The upstream {upstream} answered without choices")
    if not are_well_formed(choices):
        return misshapen(upstream)
    frame = {field: value for field, value in answer.items() if field not in ("choices", "usage")}
    return Answer(frame, choices, usage_of(answer))


def passable(body: bytes, upstream: str) -> Mapping[str, Any] | CallFailure:
    """A body that is passed on as it is, read; or why it would be no answer to any request for JSON."""
    answer = _object(body, upstream)
    return answer if isinstance(answer, CallFailure) else _error_inside(answer, body, upstream) or answer


def _object(body: bytes, upstream: str) -> Mapping[str, Any] | CallFailure:
    try:
        answer = orjson.loads(body)
    except orjson.JSONDecodeError:
        return CallFailure("malformed", f"The upstream {upstream} answered with malformed JSON")
    if not isinstance(answer, dict):
        return CallFailure("malformed", f"The upstream {upstream} answered with JSON that is no object")
    return answer


def _error_inside(answer: Mapping[str, Any], body: bytes, upstream: str) -> CallFailure | None:
    # What says of what kind it is, as a failed response does, is an answer all the same.
    if isinstance(answer.get("error"), dict) and "object" not in answer:
        detail = _error_message(body) or "an error"
        return CallFailure("error", f"The upstream {upstream} answered 200 with {detail}", body=in_shape(body) or b"")
    return None


def usage_of(answer: Mapping[str, Any]) -> Mapping[str, Any] | None:
    usage = answer.get("usage")
    return usage if isinstance(usage, dict) else None


def choice_text(choice: Mapping[str, Any]) -> str:
    """All text that a model wrote into a choice: content, reasoning, refusal, arguments of tool calls."""
    message = choice.get("message")
    if not isinstance(message, dict):
        return str(choice.get("text") or "")
    said = [message.get(key) for key in ("reasoning_content", "reasoning", "content", "refusal")]
    calls = message.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function") if isinstance(call, dict) else None
        said += [function.get("name"), function.get("arguments")] if isinstance(function, dict) else []
    return "".join(part for part in said if isinstance(part, str))


def payloads_of(candidate: Candidate, endpoint: Endpoint) -> list[bytes]:
    """A whole answer as a stream's payloads, for an upstream that does not stream and for answers of our own."""
    return events_of(candidate.answer) if endpoint == "responses" else chunks_of(candidate, endpoint)


class _Fold(Protocol):
    """One stream's payloads, as far as they have come."""

    @property
    def answer(self) -> Mapping[str, Any]: ...

    @property
    def choice(self) -> Mapping[str, Any]: ...

    @property
    def usage(self) -> Mapping[str, Any] | None: ...

    @property
    def failure(self) -> CallFailure | None:
        """What the stream itself said went wrong."""

    @property
    def ended(self) -> bool:
        """The stream has said that its answer is whole."""

    def take(self, event: Mapping[str, Any], /) -> None: ...


class StreamRecorder:
    """Takes one upstream stream of one choice: keeps its payloads, and folds them into the whole choice."""

    def __init__(self, upstream: str, endpoint: Endpoint = "chat") -> None:
        self._upstream = upstream
        self._payloads: list[bytes] = []
        self._fold: _Fold = ResponseFold(upstream) if endpoint == "responses" else ChoiceFold()
        self._failure: CallFailure | None = None
        self._done = False

    @property
    def usage(self) -> Mapping[str, Any] | None:
        return self._fold.usage

    @property
    def received(self) -> str:
        """The text that came so far, for an estimate of what it cost."""
        return choice_text(self._fold.choice)

    async def record(self, pieces: AsyncIterator[bytes]) -> None:
        """Raises `UpstreamError` when the stream breaks off."""
        parser = EventParser()
        async for piece in pieces:
            for payload in parser.feed(piece):
                self._take(payload)
            if self._done or self._failure is not None:
                return
        for payload in parser.close():
            self._take(payload)

    def candidate(self, index: int, call: Call) -> Candidate:
        failure = self._failure
        if failure is None and not self._done and not self._fold.ended:
            # Clients take a stream that merely ends for a whole answer: it must not win.
            failure = CallFailure("broken", f"The upstream {self._upstream} broke off its stream")
        if failure is None and not self._fold.choice:
            failure = CallFailure("malformed", f"The upstream {self._upstream} streamed no choice")
        if failure is not None:
            return Candidate(index, call, failure)
        fold = self._fold
        return Candidate(index, call, answer=fold.answer, choice=fold.choice, chunks=tuple(self._payloads))

    def partial(self, index: int) -> Candidate:
        """What has come so far, whatever is missing; without a call of its own."""
        fold = self._fold
        return Candidate(index, Call(0.0), answer=fold.answer, choice=dict(fold.choice))

    @property
    def payloads(self) -> Sequence[bytes]:
        """Those that came so far; it grows."""
        return self._payloads

    def _take(self, payload: bytes) -> None:
        if self._done or self._failure is not None:
            return
        if payload.strip() == DONE:
            self._done = True
            return
        try:
            event = orjson.loads(payload)
        except orjson.JSONDecodeError:
            self._failure = CallFailure("malformed", f"The upstream {self._upstream} streamed malformed JSON")
            return
        if not isinstance(event, dict):
            return
        if event.get("error"):
            detail = _error_message(payload) or "an error"
            self._failure = CallFailure(
                "error", f"The upstream {self._upstream} broke off: {detail}", body=in_shape(payload) or b""
            )
            return
        choices = event.get("choices")
        if choices is not None and not are_well_formed(choices):
            self._failure = misshapen(self._upstream)
            return
        self._payloads.append(payload)
        self._fold.take(event)
        self._failure = self._fold.failure


def _error_message(body: bytes) -> str:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return body[:_MESSAGE_CHARS].decode("utf-8", "replace").strip()
    error = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
    message = error.get("message") if isinstance(error, dict) else error
    return str(message)[:_MESSAGE_CHARS] if message is not None else ""
