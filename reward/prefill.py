"""Prompts encoded ahead of their completions, while the devices have nothing else to do."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from feedback.records import Message, Messages
from reward.batching_worker import BatchingWorker
from reward.errors import RewardError
from reward.rendering import Rendered, content_text
from reward.replicas import Replica
from reward.scorer import RawScore
from reward.shared_prefix import LivePrefixes

if TYPE_CHECKING:
    from reward.model import RewardModel

logger = logging.getLogger(__name__)

LEAST_PREFILLED = 64
"""A prompt is encoded ahead from this many tokens on: a pass of its own costs as much as some 40 of them."""
_ANY_ANSWER: list[Message] = [{"role": "assistant", "content": "Yes"}]


@dataclass(slots=True)
class _Expected:
    tokens: int = 0
    """Of the room that is taken for it."""


class Prefilling:
    """Encodes prompts of which completions are expected, a step at a time, one after the other.

    What is expected at once never exceeds what a model remembers: no prompt is forgotten for a later one.
    """

    def __init__(
        self, worker: BatchingWorker[Rendered, RawScore], replicas: Sequence[Replica], prefixes: LivePrefixes
    ) -> None:
        self._worker = worker
        self._replicas = replicas
        self._prefixes = prefixes
        model = replicas[0].model
        self._renderer = model.renderer
        self._room = model.sharing.cache_tokens if model.sharing is not None else 0

    @contextlib.asynccontextmanager
    async def expecting(self, prompt: Messages) -> AsyncIterator[None]:
        """Until the block ends, completions of this prompt may come to be scored."""
        expected = _Expected()
        ahead = asyncio.create_task(self._prefill(prompt, expected))
        try:
            yield
        finally:
            ahead.cancel()
            try:
                await asyncio.gather(ahead, return_exceptions=True)
            finally:
                # Also where the waiting is cancelled: room that is not given back is lost for good.
                self._room += expected.tokens

    async def _prefill(self, prompt: Messages, expected: _Expected) -> None:
        try:
            if self._room < LEAST_PREFILLED or sum(len(content_text(one)) for one in prompt) < LEAST_PREFILLED:
                return
            # By an answer, since some templates change earlier turns once one follows.
            rendered = await asyncio.to_thread(self._renderer.render, prompt, _ANY_ANSWER)
            ids = rendered.ids[: rendered.completion_start]
            # A prompt that is cut begins elsewhere with every completion.
            if rendered.truncated or not LEAST_PREFILLED <= len(ids) <= self._room:
                return
            expected.tokens = len(ids)
            self._room -= len(ids)
            await self._encode(ids)
        except RewardError:
            pass  # Whoever scores will hear of it.
        except Exception:
            # Messages come from clients in shapes nobody thought of, and nobody waits for this.
            logger.info("a prompt could not be encoded ahead of its completions", exc_info=True)

    async def _encode(self, ids: list[int]) -> None:
        num_encoded = 0

        def encode(model: RewardModel) -> int:
            assert model.sharing is not None, "there is no room otherwise"
            return model.sharing.prefill(ids)

        async def step(device: int) -> None:
            nonlocal num_encoded
            num_encoded = await self._replicas[device].run(encode)

        prefix = self._prefixes.of(ids)
        while num_encoded < len(ids) - 1:
            before = num_encoded
            await self._worker.when_idle(step, prefix)
            if num_encoded <= before:
                return  # Another device, or forgotten meanwhile: then it is not worth more.
