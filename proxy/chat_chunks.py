"""Chunks of chat and legacy streams: folded into a whole choice, or made from a whole answer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import orjson

from proxy.candidates import CallFailure, Candidate, Endpoint

Json = dict[str, Any]


class ChoiceFold:
    """Takes one stream's chunks in order; the choice grows to what a plain answer would have held."""

    def __init__(self) -> None:
        self.answer: Json = {}
        self.choice: Json = {}
        self.usage: Mapping[str, Any] | None = None
        self.failure: CallFailure | None = None
        """Always None: an error in these streams is no chunk, and the recorder's to see."""

    @property
    def ended(self) -> bool:
        """Its finish reason has come."""
        return self.choice.get("finish_reason") is not None

    def take(self, event: Mapping[str, Any]) -> None:
        self.answer = self.answer or {key: event[key] for key in event.keys() - {"choices", "usage"}}
        usage = event.get("usage")
        self.usage = usage if isinstance(usage, dict) else self.usage
        for choice in event.get("choices") or []:
            if isinstance(choice, dict):
                _fold_choice(self.choice, choice)


def chunks_of(candidate: Candidate, endpoint: Endpoint) -> list[bytes]:
    """One payload with everything in it, which every client bears."""
    choice = {key: value for key, value in candidate.choice.items() if key != "message"}
    answer = dict(candidate.answer)
    if endpoint == "chat":
        answer["object"] = "chat.completion.chunk"
        delta = dict(candidate.message)
        if isinstance(delta.get("tool_calls"), list):
            delta["tool_calls"] = [{"index": i, **call} for i, call in enumerate(delta["tool_calls"])]
        choice["delta"] = delta
    return [orjson.dumps(answer | {"choices": [choice]})]


def as_plain(candidate: Candidate, endpoint: Endpoint) -> Candidate:
    """One that was folded from a stream, as a plain answer would have held it."""
    if endpoint == "responses":
        return replace(candidate, chunks=())
    choice = dict(candidate.choice)
    answer = dict(candidate.answer)
    if endpoint == "chat":
        answer["object"] = "chat.completion"
        message = dict(candidate.message)
        if isinstance(message.get("tool_calls"), list):
            calls = message["tool_calls"]
            message["tool_calls"] = [{key: value for key, value in call.items() if key != "index"} for call in calls]
        choice["message"] = message
    return replace(candidate, answer=answer, choice=choice, chunks=())


def with_text(candidate: Candidate, text: str) -> Candidate:
    """The same with another text."""
    if "message" not in candidate.choice:
        return replace(candidate, choice=dict(candidate.choice) | {"text": text})
    message = dict(candidate.message) | {"content": text}
    return replace(candidate, choice=dict(candidate.choice) | {"message": message})


def _fold_choice(whole: Json, part: Mapping[str, Any]) -> None:
    for key, value in part.items():
        if key == "delta":
            _fold(whole.setdefault("message", {"role": "assistant", "content": None}), value or {})
        elif key == "text":
            whole["text"] = whole.get("text", "") + (value or "")
        elif key == "logprobs" and isinstance(value, dict):
            before = whole.get(key)
            whole[key] = _joined_logprobs(before if isinstance(before, dict) else {}, value)
        elif value is not None or key not in whole:
            whole[key] = value


def _joined_logprobs(before: Mapping[str, Any], value: Mapping[str, Any]) -> Json:
    """Lists grow by the new tokens': chat's `content` and `refusal`, the legacy `tokens`, `text_offset` and so on."""
    joined = dict(before)
    for name, tokens in value.items():
        earlier = joined.get(name)
        joined[name] = [*earlier, *tokens] if isinstance(earlier, list) and isinstance(tokens, list) else tokens
    return joined


def _fold(whole: Json, delta: Mapping[str, Any]) -> None:
    """Texts grow, lists with an `index` are folded item by item, everything else is replaced."""
    for key, value in delta.items():
        before = whole.get(key)
        if isinstance(value, list) and all(isinstance(item, dict) and "index" in item for item in value):
            whole[key] = _fold_items(before if isinstance(before, list) else [], value)
        elif isinstance(before, list) and isinstance(value, list):
            whole[key] = [*before, *value]
        elif isinstance(before, list) and isinstance(value, str) and value:
            # Some models send their thoughts as parts, and then plain text.
            whole[key] = [*before, {"type": "text", "text": value}]
        elif isinstance(value, str) and isinstance(before, str) and key not in ("role", "id", "type"):
            whole[key] = before + value
        elif isinstance(value, dict) and isinstance(before, dict):
            _fold(before, value)
        elif value is not None or key not in whole:
            whole[key] = value


def _fold_items(items: list[Json], parts: list[Json]) -> list[Json]:
    for part in parts:
        item = next((one for one in items if isinstance(one, dict) and one.get("index") == part["index"]), None)
        if item is None:
            item = {"index": part["index"]}
            items.append(item)
        _fold(item, {key: value for key, value in part.items() if key != "index"})
    return items
