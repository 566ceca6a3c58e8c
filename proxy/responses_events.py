"""The typed events of a streamed response: folded into a candidate, replayed, or made from a whole answer."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import orjson

from proxy.candidates import CallFailure
from proxy.choices import is_well_formed, misshapen
from proxy.responses_output import choice_of, failure_of, usage_in_chat_names
from proxy.sse import named_event

_LAST = ("response.completed", "response.incomplete", "response.failed")
_NUMBER = re.compile(rb'"sequence_number": ?([0-9]{1,9})')
_IN_PROGRESS: dict[str, Any] = {"status": "in_progress", "output": [], "usage": None, "incomplete_details": None}

Json = dict[str, Any]


class ResponseFold:
    """Takes one stream's events in order. The last one holds the whole answer; until then, the text so far."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream
        self.answer: Json = {}
        self.choice: Json = {}
        self.usage: Mapping[str, Any] | None = None
        self.failure: CallFailure | None = None
        self.ended = False

    def take(self, event: Mapping[str, Any]) -> None:
        kind = event.get("type")
        response = event.get("response")
        if kind == "error":
            message = f"The upstream {self._upstream} broke off: {event.get('message') or 'an error'}"
            self.failure = CallFailure("error", message, body=_enveloped(event, message))
        elif kind in _LAST and isinstance(response, dict):
            self._end(response)
        elif kind == "response.output_text.delta" and isinstance(event.get("delta"), str):
            message = self.choice.setdefault("message", {"role": "assistant", "content": ""})
            message["content"] += event["delta"]
        elif isinstance(response, dict):
            self.answer = response

    def _end(self, response: Json) -> None:
        self.ended = True
        self.failure = failure_of(response, self._upstream)
        usage = response.get("usage")
        self.usage = usage_in_chat_names(usage) if isinstance(usage, dict) else None
        self.answer = response
        if self.failure is None:
            self.choice = choice_of(response)
            self.failure = None if is_well_formed(self.choice) else misshapen(self._upstream)


def _enveloped(event: Mapping[str, Any], message: str) -> bytes:
    code = event.get("code")
    error = {"message": message, "type": "upstream_error", "param": None, "code": None if code is None else str(code)}
    return orjson.dumps({"error": error})


def replayed(payloads: Sequence[bytes], response: Mapping[str, Any]) -> Iterator[bytes]:
    """The winner's events as they came, numbered from 0 without a gap, its last one with `response` in it."""
    for number, payload in enumerate(payloads):
        event = orjson.loads(payload)
        if event.get("type") in _LAST:
            event["response"] = response
        elif event.get("sequence_number") == number:
            yield named_event(str(event.get("type")), payload)
            continue
        event["sequence_number"] = number
        yield named_event(str(event.get("type")), orjson.dumps(event))


def events_of(response: Mapping[str, Any]) -> list[bytes]:
    """Payloads of a whole answer, for an upstream that does not stream and for answers of our own."""
    return [orjson.dumps(event | {"sequence_number": number}) for number, event in enumerate(typed_events(response))]


def typed_events(response: Mapping[str, Any]) -> list[Json]:
    """A whole answer as events, each of its parts in one delta. Not numbered yet."""
    status = response.get("status") or "completed"
    opening = dict(response) | _IN_PROGRESS
    events: list[Json] = [
        {"type": "response.created", "response": opening},
        {"type": "response.in_progress", "response": opening},
    ]
    for index, item in enumerate(response.get("output") or []):
        if isinstance(item, dict):
            events += _item_events(index, item)
    events.append({"type": f"response.{status}", "response": dict(response)})
    return events


def _item_events(index: int, item: Json) -> Iterator[Json]:
    place = {"item_id": item.get("id"), "output_index": index}
    kind = item.get("type")
    started = item | {"status": "in_progress"} if "status" in item else dict(item)
    if kind == "message":
        started |= {"content": []}
    elif kind == "function_call":
        started |= {"arguments": ""}
    yield {"type": "response.output_item.added", "output_index": index, "item": started}
    if kind == "message":
        parts = item.get("content")
        for position, part in enumerate(parts if isinstance(parts, list) else ()):
            if isinstance(part, dict):
                yield from _part_events(place | {"content_index": position}, part)
    elif kind == "function_call":
        arguments = item.get("arguments")
        yield {"type": "response.function_call_arguments.delta", **place, "delta": arguments}
        name = item.get("name")
        yield {"type": "response.function_call_arguments.done", **place, "name": name, "arguments": arguments}
    yield {"type": "response.output_item.done", "output_index": index, "item": item}


def _part_events(place: Json, part: Json) -> Iterator[Json]:
    member = "refusal" if part.get("type") == "refusal" else "text"
    name = "refusal" if member == "refusal" else "output_text"
    logprobs: Json = {} if member == "refusal" else {"logprobs": part.get("logprobs") or []}
    yield {"type": "response.content_part.added", **place, "part": part | {member: ""}}
    yield {"type": f"response.{name}.delta", **place, "delta": part.get(member), **logprobs}
    yield {"type": f"response.{name}.done", **place, member: part.get(member), **logprobs}
    yield {"type": "response.content_part.done", **place, "part": part}


def error_payload(message: str, type_: str, code: str | None, param: str | None, number: int = 0) -> bytes:
    """Ends a stream in trouble; `number` events were sent before."""
    # The flat members are the documented event. `error` beside them makes the official clients raise: they hand on
    # the flat event like any other, and a loop that looks for text only would take the end for success.
    flat = {"type": "error", "code": code, "message": message, "param": param, "sequence_number": number}
    return orjson.dumps(flat | {"error": {"message": message, "type": type_, "param": param, "code": code}})


def next_number(sent: bytes) -> int:
    """The sequence number after the last one in what was sent of a stream, its end suffices."""
    numbers = _NUMBER.findall(sent)
    return int(numbers[-1]) + 1 if numbers else 0
