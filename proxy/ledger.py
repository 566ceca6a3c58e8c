"""The books of one request: every upstream call it made, what was billed or has to be estimated, and the price.

The upstream's word counts wherever it gave one. A call that was cut off (cancelled, pruned, lost) is billed by most
providers all the same, but nobody says how much: its prompt and the text that came are then estimated, and the bill
says so. Calls that were refused or never connected cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from proxy.candidates import Call

BYTES_PER_TOKEN = 4.0
"""Of UTF-8: some 4 characters of English, 1.3 of Chinese. Within a third for the tokenizers of today's large models."""
_MESSAGE_TOKENS = 4
"""What chat templates put around each message."""
_PER_MILLION = 1_000_000


@dataclass(frozen=True, slots=True)
class Price:
    """US dollars for a million tokens."""

    prompt: float
    completion: float
    cached_prompt: float | None = None
    """For prompt tokens that the upstream had in its cache; None: as for the others."""


@dataclass(slots=True)
class Ledger:
    """The calls of one request, written down as each ends, so that also a request that fails knows what it spent."""

    calls: list[Call] = field(default_factory=list)

    def enter(self, call: Call) -> Call:
        self.calls.append(call)
        return call


@dataclass(frozen=True, slots=True)
class Tokens:
    """What one call, or several, cost in tokens. `cached` are among `prompt`."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0
    estimated: bool = False

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(
            self.prompt + other.prompt,
            self.completion + other.completion,
            self.cached + other.cached,
            self.estimated or other.estimated,
        )

    def described(self) -> dict[str, int]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
        }


@dataclass(frozen=True, slots=True)
class Bill:
    """All that a request spent upstream."""

    tokens: Tokens
    cost: float | None
    """US dollars; None where some call's model has no price, since a part of the sum would look like all of it."""
    num_calls: int


def settle(calls: Iterable[Call], prices: Mapping[str, Price]) -> Bill:
    """The bill for these calls; one that is named twice is counted once."""
    different = list({id(call): call for call in calls}.values())
    counted = [(call, tokens_of(call)) for call in different]
    costs = [cost_of(tokens, prices.get(call.model or "")) for call, tokens in counted]
    total = sum((tokens for _, tokens in counted), Tokens())
    priced = [cost for cost in costs if cost is not None]
    return Bill(total, math.fsum(priced) if len(priced) == len(costs) and costs else None, len(different))


def tokens_of(call: Call) -> Tokens:
    """As billed, where the upstream said; else an estimate, where it may have worked; else nothing."""
    if call.usage is not None:
        return billed_tokens(call.usage)
    if call.end == "refused":
        return Tokens()
    prompt = estimate_prompt(call.request) if call.request is not None else 0
    return Tokens(prompt, max(estimate_tokens(call.received), call.num_events), estimated=True)


def billed_tokens(usage: Mapping[str, Any]) -> Tokens:
    """From OpenAI's `usage`, in the words of chat completions or of responses."""
    prompt = _count(usage, "prompt_tokens") or _count(usage, "input_tokens")
    completion = _count(usage, "completion_tokens") or _count(usage, "output_tokens")
    details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
    cached = _count(details, "cached_tokens") if isinstance(details, dict) else 0
    return Tokens(prompt, completion, min(cached, prompt))


def cost_of(tokens: Tokens, price: Price | None) -> float | None:
    """US dollars; nothing spent costs nothing, whatever the price."""
    if tokens.prompt == 0 and tokens.completion == 0:
        return 0.0
    if price is None:
        return None
    fresh = tokens.prompt - tokens.cached
    cached_price = price.prompt if price.cached_prompt is None else price.cached_prompt
    in_millionths = fresh * price.prompt + tokens.cached * cached_price + tokens.completion * price.completion
    return in_millionths / _PER_MILLION


def estimate_tokens(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", "surrogatepass")) / BYTES_PER_TOKEN)


def estimate_prompt(body: Mapping[str, Any]) -> int:
    """Of the texts in `messages`, `prompt` or `input`, tools included; images and sounds are not counted."""
    messages = body.get("messages") or body.get("input") or body.get("prompt")
    num_messages = len(messages) if isinstance(messages, list) and "messages" in body else 0
    texts = [*_texts(messages), *_texts(body.get("instructions")), *_texts(body.get("tools"))]
    return sum(map(estimate_tokens, texts)) + num_messages * _MESSAGE_TOKENS


def saved_tokens(complete: Sequence[int], partial: Sequence[int], num_undrawn: int) -> int:
    """Completion tokens that pruning and stopping early saved, by the mean of the complete candidates.

    `partial` are the tokens that pruned candidates had reached; `num_undrawn` could have been drawn and were not.
    """
    if not complete:
        return 0
    mean = sum(complete) / len(complete)
    return round(sum(max(0.0, mean - count) for count in partial) + mean * num_undrawn)


def share_of(call: Call, size: int, sizes: Sequence[int]) -> Tokens:
    """What one candidate of a call that brought several cost: by its share of the text. The prompt is everyone's."""
    tokens = tokens_of(call)
    if len(sizes) <= 1:
        return tokens
    whole = sum(sizes)
    completion = round(tokens.completion * size / whole) if whole else tokens.completion // len(sizes)
    return Tokens(tokens.prompt, completion, tokens.cached, estimated=True)


def _count(usage: Mapping[str, Any], name: str) -> int:
    value = usage.get(name)
    return value if isinstance(value, int) and value > 0 and value is not True else 0


def _texts(value: object) -> list[str]:
    """Every string that a model reads; data URLs and addresses of images are none."""
    found: list[str] = []
    pending = [value]
    while pending:
        node = pending.pop()
        if isinstance(node, str):
            found.append(node)
        elif isinstance(node, list):
            pending.extend(node)
        elif isinstance(node, dict):
            pending.extend(member for key, member in node.items() if key not in _NOT_TEXT)
    return found


_NOT_TEXT = frozenset({"role", "type", "id", "tool_call_id", "image_url", "input_audio", "file", "detail", "status"})
