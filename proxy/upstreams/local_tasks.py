"""What passes between the local upstream and its engine's thread: a task goes in, its news comes out. No torch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from proxy.upstreams.local_requests import SamplingParams
from proxy.upstreams.local_text import TokenLogprob

FinishReason = Literal["stop", "length"]


class EngineFullError(Exception):
    """As many tasks wait as may; try again later."""


class EngineClosedError(Exception):
    """The engine stops, or has stopped."""


@dataclass(frozen=True, slots=True)
class PromptTask:
    """One prompt and what to draw for it."""

    token_ids: tuple[int, ...]
    max_tokens: int
    want_prompt_logprobs: bool = False


@dataclass(frozen=True, slots=True)
class Delta:
    """News of one candidate: text and log-probabilities that are final, perhaps none yet at its first token."""

    prompt: int
    candidate: int
    text: str
    tokens: tuple[TokenLogprob, ...]
    num_tokens: int
    """Drawn so far, the token that ended the answer included."""
    finish_reason: FinishReason | None


@dataclass(frozen=True, slots=True)
class PromptScored:
    """Log-probabilities of a prompt's own tokens. Comes before the prompt's first delta."""

    prompt: int
    tokens: tuple[TokenLogprob, ...]


@dataclass(frozen=True, slots=True)
class Failed:
    """The task is over without its remaining candidates."""

    error: Exception


Event = Delta | PromptScored | Failed


class Task:
    """One call: prompts, n candidates of each, and where its news goes.

    `deliver` is called from the engine's thread with the news of one step. The task is over after a `Failed`, or
    the last candidate's `finish_reason`. Unless `streamed`, each candidate is told of once, when it is whole.
    """

    def __init__(
        self,
        prompts: Sequence[PromptTask],
        n: int,
        sampling: SamplingParams,
        deliver: Callable[[list[Event]], None],
        *,
        streamed: bool,
    ) -> None:
        self.prompts = tuple(prompts)
        self.n = n
        self.sampling = sampling
        self.deliver = deliver
        self.streamed = streamed
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Nobody waits any more: its candidates leave the batch before the next token. From any thread, repeatedly."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        return self._cancelled.is_set()
