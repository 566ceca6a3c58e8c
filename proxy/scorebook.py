"""The scores of one prompt's candidates, asked for while others are still being drawn."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Sequence

from proxy.candidates import Candidate
from proxy.prompts import PromptPart
from proxy.validity import fingerprint
from reward.errors import QueueFullError, RewardError
from reward.scorer import Score, Scorer

_Call = asyncio.Task[dict[bytes, Score]]
"""Scores by fingerprints: of candidates that say the same, one is scored."""


class Scorebook:
    """Each different candidate is scored once, from when it is announced or, at the latest, asked for.

    Announced ones go to the scorer in one call at a time, and what arrives meanwhile goes into the next one: a scorer
    that is slow or far away gets few calls. What is asked for waits for no other call. Close it from the same loop.
    """

    def __init__(self, scorer: Scorer | None, part: PromptPart, echoed: str) -> None:
        """`echoed`: what each text begins with that is not its own."""
        self._scorer = scorer
        self._part = part
        self._echoed = echoed
        self._waiting: dict[bytes, Candidate] = {}
        self._calls: dict[bytes, _Call] = {}
        self._started: list[_Call] = []
        self._early: _Call | None = None
        self._turn: asyncio.Handle | None = None

    def announce(self, candidate: Candidate) -> None:
        """It will be asked for: its scoring may begin."""
        print_ = fingerprint(candidate)
        if self._scorer is None or print_ in self._calls:
            return
        self._waiting[print_] = candidate
        if self._turn is None:
            # Not at once: what arrives in the same turn of the loop goes together.
            self._turn = asyncio.get_running_loop().call_soon(self._begin_early)

    async def scores(self, candidates: Sequence[Candidate], deadline: float | None) -> list[Score]:
        """One a candidate. Raises `RewardError`, and `TimeoutError` at `deadline`, in the loop's time.

        What failed before anybody asked, or was told already, is tried again.
        """
        if not candidates:
            return []
        if self._scorer is None:
            raise RewardError("no reward model is configured")
        prints = [fingerprint(candidate) for candidate in candidates]
        self._calls = {print_: call for print_, call in self._calls.items() if not _failed(call)}
        new = zip(prints, candidates, strict=True)
        self._waiting |= {print_: candidate for print_, candidate in new if print_ not in self._calls}
        if self._waiting:
            self._begin()
        calls = [self._calls[print_] for print_ in prints]
        if pending := {call for call in calls if not call.done()}:
            async with asyncio.timeout_at(deadline):
                await asyncio.wait(pending)
        for call in calls:
            if (failure := call.exception()) is not None:
                raise failure
        return [call.result()[print_] for call, print_ in zip(calls, prints, strict=True)]

    async def aclose(self) -> None:
        """Ends what is under way."""
        if self._turn is not None:
            self._turn.cancel()
        self._waiting.clear()
        for call in self._started:
            call.cancel()
        await asyncio.gather(*self._started, return_exceptions=True)

    def _begin_early(self) -> None:
        self._turn = None
        if self._waiting and (self._early is None or self._early.done()):
            self._early = self._begin()
            self._early.add_done_callback(self._early_ended)

    def _early_ended(self, call: _Call) -> None:
        if call.cancelled():
            return
        # Whoever asks may find room in a full queue; until then the scorer is left alone.
        if not isinstance(call.exception(), QueueFullError):
            self._begin_early()

    def _begin(self) -> _Call:
        asked, self._waiting = self._waiting, {}
        call = asyncio.create_task(self._score(asked))
        self._started.append(call)
        self._calls |= dict.fromkeys(asked, call)
        return call

    async def _score(self, asked: dict[bytes, Candidate]) -> dict[bytes, Score]:
        assert self._scorer is not None, "nothing is begun without one"
        completions = [[candidate.completion(self._echoed)] for candidate in asked.values()]
        scores = await self._scorer.score(self._part.messages, completions)
        # No order holds among such rewards, and a model that gives one is not to be trusted with the others.
        if not all(math.isfinite(score.reward) for score in scores):
            raise RewardError("it gave a reward that is not finite")
        return dict(zip(asked, scores, strict=True))


def _failed(call: _Call) -> bool:
    return call.done() and (call.cancelled() or call.exception() is not None)
