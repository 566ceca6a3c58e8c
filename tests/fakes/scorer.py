"""A scorer whose rewards can be read off the text: words `good` less words `bad`. Faults on demand."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence

from feedback.records import Message, Messages
from reward.scorer import Score, TemplatedText

_WAIT_S = 20


class FakeScorer:
    def __init__(self, name: str = "fake") -> None:
        self.name = name
        self.ready = False
        self.failure: Exception | None = None
        """Raised by every call while set."""
        self.scored: list[tuple[Messages, Sequence[Messages]]] = []
        self.has_references = True
        self.rewards: dict[str, float] = {}
        """By text, where the words are not to decide."""
        self.std: float | None = None
        self.objectives: Mapping[str, float] | None = None
        """What several heads say of every text, for a fake that has such."""
        self.before: Callable[[], None] | None = None
        """Called, on a thread of its own, before anything is scored."""
        self._num_scored = 0
        self._changed = threading.Condition()

    async def start(self) -> None:
        self.ready = True

    async def score(self, prompt: Messages, completions: Sequence[Messages]) -> list[Score]:
        self.scored.append((prompt, completions))
        if self.before is not None:
            await asyncio.to_thread(self.before)
        if self.failure is not None:
            raise self.failure
        scores = [self._score(completion[-1]) for completion in completions]
        with self._changed:
            self._num_scored += len(scores)
            self._changed.notify_all()
        return scores

    def wait_for(self, count: int) -> None:
        """Until so many completions have been scored; for other threads than the scorer's."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._num_scored >= count, _WAIT_S), f"scored {self._num_scored}"

    async def score_texts(self, texts: Sequence[TemplatedText]) -> list[Score]:
        messages: list[Message] = [{"role": "assistant", "content": one.text} for one in texts]
        return [self._score(message) for message in messages]

    def reward_at_percentile(self, percentile: float) -> float | None:
        return percentile / 10 - 5 if self.has_references else None

    async def aclose(self) -> None:
        self.ready = False

    def _score(self, message: Message) -> Score:
        text = str(message.get("content") or "")
        words = text.split()
        reward = self.rewards.get(text, float(words.count("good") - words.count("bad")))
        return Score(
            reward=reward,
            raw_reward=reward * 2,
            percentile=min(100.0, max(0.0, 50 + 10 * reward)),
            truncated=False,
            prompt_tokens=1,
            completion_tokens=len(words),
            std=self.std,
            objectives=self.objectives,
        )
