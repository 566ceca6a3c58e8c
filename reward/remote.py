"""RemoteScorer: rewards from a service elsewhere, checked before they are trusted. Nothing here imports torch.

How bytes get there is handed in (`Transport`); what they say is `dialects.py`.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Sequence
from typing import Any, Protocol

from feedback.records import Message, Messages
from reward.dialects import Dialect, RemoteScore
from reward.errors import InputError, ModelLoadError, QueueFullError, ScoringError, UnreachableError
from reward.normalisation import Normalisation
from reward.scorer import Score, TemplatedText

logger = logging.getLogger(__name__)

_PAIRS = (
    ("What is the capital of France?", "The capital of France is Paris.", "Bananas bananas the of of seventeen."),
    (
        "How do I boil an egg?",
        "Put the egg into boiling water, and take it out after seven minutes.",
        "I do not care. Go away and stop asking me such stupid things.",
    ),
    ("Translate 'good morning' into Spanish.", "Buenos días.", "xq zzv 9917 kkkk qqpl ;;;; nnnn"),
)
"""Better and worse answers that any reward model of people's taste tells apart."""
_UNREADY = (UnreachableError, QueueFullError)
"""What a service says nothing by but that it should be asked again later."""
_LONG_WORDS = 4000
"""A prompt of so many words is longer than most encoders read, and shorter than decoders do."""


class Transport(Protocol):
    """Brings a request to one of the service's replicas."""

    async def open(self) -> None: ...

    async def post(self, path: str, body: bytes) -> bytes:
        """The body of a 200. Raises `UnreachableError`, `QueueFullError`, `InputError` (refused), `ScoringError`."""

    async def aclose(self) -> None: ...


class RemoteScorer:
    """The `Scorer` over a scoring service.

    When it starts, known pairs are scored: a service that presses its scores through a sigmoid or a softmax, does not
    read the end of a long text, or prefers the worse answers is refused with the reason. One that cannot be reached is
    asked again every `recheck_s` seconds, and not ready until then.
    """

    def __init__(
        self,
        name: str,
        dialect: Dialect,
        transport: Transport,
        *,
        normalisation: Normalisation | None = None,
        recheck_s: float = 5.0,
    ) -> None:
        """`normalisation`: the scale of raw rewards, for a service that does not normalise."""
        self._name = name
        self._dialect = dialect
        self._transport = transport
        self._scale = normalisation or Normalisation()
        self._recheck_s = recheck_s
        self._ready = False
        self._refused: str | None = None
        self._checking: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self._name

    @property
    def ready(self) -> bool:
        return self._ready

    async def start(self) -> None:
        """Raises `ModelLoadError` for a service that answers and cannot be trusted."""
        await self._transport.open()
        try:
            await self._check()
        except _UNREADY as error:
            logger.warning("The reward model %s cannot be reached yet: %s", self._name, error)
            self._checking = asyncio.create_task(self._check_until_reached())

    async def score(self, prompt: Messages, completions: Sequence[Messages]) -> list[Score]:
        """Raises `InputError`, `QueueFullError`, `ScoringError`."""
        if self._refused is not None:
            raise ScoringError(self._refused)
        return [self._score(one) for one in await self._remote_scores(prompt, completions)]

    async def score_texts(self, texts: Sequence[TemplatedText]) -> list[Score]:
        raise InputError("this reward model runs in a service elsewhere, which is asked with messages: send those")

    def reward_at_percentile(self, percentile: float) -> float | None:
        return self._scale.at_percentile(percentile)

    async def aclose(self) -> None:
        if self._checking is not None:
            self._checking.cancel()
            await asyncio.gather(self._checking, return_exceptions=True)
        self._ready = False
        await self._transport.aclose()

    def _score(self, remote: RemoteScore) -> Score:
        reward = self._scale.reward(remote.raw_reward) if remote.reward is None else remote.reward
        return Score(
            reward=reward,
            raw_reward=remote.raw_reward,
            percentile=remote.percentile if remote.percentile is not None else self._scale.percentile(reward),
            truncated=remote.truncated,
            prompt_tokens=0,
            completion_tokens=remote.completion_tokens,
            std=remote.std,
            objectives=remote.objectives,
        )

    async def _remote_scores(self, prompt: Messages, completions: Sequence[Messages]) -> list[RemoteScore]:
        requests = self._dialect.requests(prompt, completions)
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(self._ask(request.path, request.body)) for request in requests]
        except* Exception as failures:
            raise failures.exceptions[0] from failures
        return self._dialect.scores([task.result() for task in tasks], len(completions))

    async def _ask(self, path: str, body: Any) -> Any:
        try:
            encoded = json.dumps(body, ensure_ascii=False, allow_nan=False).encode()
        except (ValueError, TypeError) as error:
            raise InputError("the messages cannot be written as JSON") from error
        answer = await self._transport.post(path, encoded)
        try:
            return json.loads(answer)
        except ValueError as error:
            raise ScoringError("the scoring service's answer is not JSON") from error

    async def _check_until_reached(self) -> None:
        while not self._ready and self._refused is None:
            await asyncio.sleep(self._recheck_s)
            try:
                await self._check()
            except _UNREADY:
                continue
            except ModelLoadError as error:
                self._refused = str(error)
                logger.error("%s", error)

    async def _check(self) -> None:
        try:
            await self._probe()
            references = self._dialect.reference_request()
            if references is not None:
                answer = await self._ask(references.path, references.body)
                self._scale = self._dialect.reference_scale(answer) or self._scale
        except _UNREADY:
            raise
        except (InputError, ScoringError) as error:
            raise ModelLoadError(f"the reward model {self._name} failed on a test text: {error}") from error
        self._ready = True

    async def _probe(self) -> None:
        gaps, scores = [], []
        for question, better, worse in _PAIRS:
            pair = await self._remote_scores(_asked(question), [_answered(better), _answered(worse)])
            gaps.append(pair[0].raw_reward - pair[1].raw_reward)
            scores += [one.raw_reward for one in pair]
        if len(set(scores)) == 1:
            self._refuse(f"every text gets {scores[0]:g}: a softmax over its only label, or a head that is missing")
        if not self._dialect.normalises and all(0 <= score <= 1 for score in scores):
            self._refuse("all scores lie between 0 and 1: it presses them through a sigmoid; ask it for raw scores")
        if sum(gap > 0 for gap in gaps) * 2 < len(gaps):
            self._refuse("it prefers the worse answers of known pairs: a wrong chat template, or another sign")
        long = _asked("Here is some text. " + "one two three four " * (_LONG_WORDS // 4) + _PAIRS[0][0])
        first, second = await self._remote_scores(long, [_answered(_PAIRS[0][1]), _answered(_PAIRS[0][2])])
        if first.raw_reward == second.raw_reward:
            self._refuse("it cuts long texts at their end, where the answers are, and does not say so")

    def _refuse(self, reason: str) -> None:
        raise ModelLoadError(f"the reward model {self._name} is not to be trusted as it is served: {reason}")


def _asked(text: str) -> list[Message]:
    return [{"role": "user", "content": text}]


def _answered(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]
