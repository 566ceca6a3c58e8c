"""The record of one candidate, from the upstream call that brought it to the reward it got."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from feedback.records import Message
from proxy.upstreams.base import UpstreamError
from reward.scorer import Score

Endpoint = Literal["chat", "completions", "responses"]
ENDPOINT_PATHS: Mapping[Endpoint, str] = {
    "chat": "/chat/completions",
    "completions": "/completions",
    "responses": "/responses",
}


CallEnd = Literal["answered", "refused", "lost", "cancelled", "pruned"]
"""How a call ended. `refused`: an error status, or no connection. `lost`: it broke off or timed out after it was sent.
`cancelled`: by us, at a deadline or since the client left. `pruned`: by us, since its candidate could not win."""


@dataclass(frozen=True, slots=True)
class Call:
    """One upstream call that ended, well or not. Calls are compared by identity when usage is added up."""

    elapsed_s: float
    usage: Mapping[str, Any] | None = None
    """As the upstream billed it; None where it did not say, or the call failed."""
    headers: Mapping[str, str] = field(default_factory=dict)
    model: str | None = None
    """As the upstream was asked for it: the name that prices go by."""
    request: Mapping[str, Any] | None = None
    """The body: where the upstream did not bill the prompt, it is estimated from this."""
    received: str = ""
    """Text that came, where there is no usage: before the call was cut off, or in an answer that did not say."""
    num_events: int = 0
    """Of a stream that nobody here read, where there is no usage: about as many tokens."""
    end: CallEnd = "answered"
    num_candidates: int = 1
    """Candidates that it was to bring."""


@dataclass(frozen=True, slots=True)
class CallFailure:
    """Why a call brought no candidate.

    `reason` is `status`, `malformed` or `error` (what came was none), that of an `UpstreamError`, or why we ended it:
    `deadline`, `quorum` (the others were enough, or it was too slow), `pruned` (its beginning was worse than theirs).
    """

    reason: str
    message: str
    status: int | None = None
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    """Those that the client may see, in lower case."""

    @classmethod
    def of(cls, error: UpstreamError) -> CallFailure:
        retry_after = error.retry_after_s
        # Whole seconds, rounded up: old clients read nothing else.
        headers = {} if retry_after is None else {"retry-after": str(math.ceil(retry_after))}
        return cls(error.reason, str(error), headers=headers)


@dataclass(frozen=True, slots=True)
class Candidate:
    """One completion drawn for a request, or the failure to draw it."""

    index: int
    """Order of drawing, from 0."""
    call: Call
    failure: CallFailure | None = None
    answer: Mapping[str, Any] = field(default_factory=dict)
    """The upstream's object around the choice; for a stream, that of its first chunk."""
    choice: Mapping[str, Any] = field(default_factory=dict)
    """As the upstream sent it; for a stream, folded from its deltas."""
    chunks: Sequence[bytes] = ()
    """For a stream: its `data:` payloads as they came, without `[DONE]`."""
    shares_call: bool = False
    """Other candidates came with the same call, so that its usage is not this candidate's alone."""

    @property
    def finish_reason(self) -> str | None:
        return cast("str | None", self.choice.get("finish_reason"))

    @property
    def message(self) -> Mapping[str, Any]:
        """The assistant's message. A legacy completion's text becomes its content."""
        if "message" in self.choice:
            message = self.choice["message"]
            return message if isinstance(message, dict) else {}
        return {"role": "assistant", "content": self.choice.get("text")}

    @property
    def content(self) -> str | None:
        """Its words; of a list of parts those of the texts."""
        content = self.message.get("content")
        if isinstance(content, list):
            texts = [part.get("text") for part in content if isinstance(part, dict)]
            return "".join(text for text in texts if isinstance(text, str))
        return content if isinstance(content, str) else None

    @property
    def transcript(self) -> str | None:
        """The words of a spoken answer."""
        audio = self.message.get("audio")
        transcript = audio.get("transcript") if isinstance(audio, dict) else None
        return transcript if isinstance(transcript, str) else None

    @property
    def own_usage(self) -> Mapping[str, Any] | None:
        """What it alone cost; None where the upstream told only what its whole call did. A choice that came with
        others may say its completion tokens."""
        own = self.choice.get("usage")
        if self.shares_call and isinstance(own, dict):
            return own
        return None if self.shares_call or self.failure is not None else self.call.usage

    def completion(self, without_prefix: str = "") -> Message:
        """What the reward model sees. `without_prefix` is an echoed prompt to take off a legacy text."""
        words = self.content or self.message.get("refusal") or self.transcript or ""
        message: dict[str, Any] = {"role": "assistant", "content": words}
        if without_prefix:
            message["content"] = message["content"].removeprefix(without_prefix)
        if tool_calls := self.message.get("tool_calls"):
            message["tool_calls"] = tool_calls
        return cast("Message", message)


@dataclass(frozen=True, slots=True)
class Judged:
    """A candidate with what was found out about it."""

    candidate: Candidate
    invalid_reason: str | None = None
    """None for a valid candidate."""
    score: Score | None = None
    """None where it was not scored: failed, invalid while others were not, or the reward model failed."""


@dataclass(frozen=True, slots=True)
class Draw:
    """What one round of drawing brought."""

    candidates: Sequence[Candidate]
    calls: Sequence[Call]
    num_calls: int
    """Calls started, those cancelled at the deadline included."""
    earlier: Draw | None = None
    """What had to end before these calls began; they hold its calls too."""

    @property
    def upstream_s(self) -> float:
        """How long the upstream was waited for."""
        num_earlier = 0 if self.earlier is None else len(self.earlier.calls)
        last_s = max((call.elapsed_s for call in self.calls[num_earlier:]), default=0.0)
        return last_s if self.earlier is None else self.earlier.upstream_s + last_s
