"""Validity and rewards for drawn candidates: candidates in, `Judged` out."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace

from proxy.candidates import Candidate, Judged
from proxy.config import OnRewardFailure
from proxy.errors import RewardUnavailableError
from proxy.prompts import PromptPart
from proxy.scorebook import Scorebook
from proxy.validity import Rules, invalid_reason
from reward.errors import QueueFullError, RewardError
from reward.scorer import Expects, Scorer

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Verdict:
    """Judged candidates in the order they came in."""

    judged: tuple[Judged, ...]
    scored: bool
    """The reward model did its work. False: it failed or there is none, and the order is that of drawing."""


@dataclass(frozen=True, slots=True)
class Judge:
    """How the candidates of one request are judged."""

    scorer: Scorer | None
    rules: Rules
    on_failure: OnRewardFailure
    strips_echo: bool
    """The texts begin with their prompt, which is not theirs to be rewarded for."""
    early: bool = True
    """Candidates are scored as they arrive."""
    expects: bool = True
    """The scorer may get ready while the upstream writes."""

    @contextlib.asynccontextmanager
    async def hearing(self, part: PromptPart) -> AsyncIterator[Hearing]:
        """Of one prompt's candidates. What is still being scored when the block ends is given up."""
        echoed = part.text if self.strips_echo and part.text else ""
        scorebook = Scorebook(self.scorer, part, echoed)
        async with self._expecting(part), contextlib.aclosing(scorebook):
            yield Hearing(self, scorebook, echoed)

    def _expecting(self, part: PromptPart) -> AbstractAsyncContextManager[None]:
        # One that is not ready yet may become so before the first candidate is there.
        scorer = self.scorer if self.expects and self.scorer is not None and self.scorer.ready else None
        return scorer.expecting(part.messages) if isinstance(scorer, Expects) else contextlib.nullcontext()

    def refuse(self, error: Exception) -> None:
        """Raises by policy `error`; otherwise the failure is logged and the answer marked unscored."""
        reason = "it was not done when the deadline passed" if isinstance(error, TimeoutError) else str(error)
        if self.scorer is not None:
            _log.warning("The reward model %s failed: %s", self.scorer.name, reason)
        if self.on_failure == "error":
            retry = error.retry_after_s if isinstance(error, QueueFullError) else 1.0
            message = f"The candidates could not be scored: {reason}"
            raise RewardUnavailableError(message, headers={"retry-after": f"{retry:g}"}) from error


class Hearing:
    """One prompt's candidates before their judge: each is looked at as it arrives, and judged with the others."""

    def __init__(self, judge: Judge, scorebook: Scorebook, echoed: str) -> None:
        self._judge = judge
        self._reasons: dict[int, str | None] = {}
        """Why candidates are invalid, by their indices: a schema is held against each once."""
        self.scorebook = scorebook
        self.echoed = echoed
        """What each text begins with that is not its own."""

    def is_valid(self, candidate: Candidate) -> bool:
        return self._reason(candidate) is None

    def arrived(self, candidate: Candidate) -> None:
        """One that others are still waited for. If it is valid, its scoring begins."""
        if self._judge.early and self._judge.scorer is not None and self.is_valid(candidate):
            self.scorebook.announce(candidate)

    async def judge(self, candidates: Sequence[Candidate], deadline: float | None) -> Verdict:
        """Scores the valid candidates, or, where none is, those that at least said something.

        `deadline` is in the loop's time. Raises `RewardUnavailableError` if the policy is `error`.
        """
        judged = [Judged(candidate, self._reason(candidate)) for candidate in candidates]
        worth_scoring = [position for position, one in enumerate(judged) if one.invalid_reason is None]
        if not worth_scoring:
            worth_scoring = [
                position for position, one in enumerate(judged)
                if one.candidate.failure is None and (one.candidate.content or one.candidate.message.get("tool_calls"))
            ]  # fmt: skip
        try:
            scores = await self.scorebook.scores([candidates[position] for position in worth_scoring], deadline)
        except (RewardError, TimeoutError) as error:
            self._judge.refuse(error)
            return Verdict(tuple(judged), scored=False)
        for position, score in zip(worth_scoring, scores, strict=True):
            judged[position] = replace(judged[position], score=score)
        return Verdict(tuple(judged), scored=True)

    def _reason(self, candidate: Candidate) -> str | None:
        if candidate.failure is not None:
            return candidate.failure.message
        if candidate.index not in self._reasons:
            self._reasons[candidate.index] = invalid_reason(candidate, self._judge.rules, self.echoed)
        return self._reasons[candidate.index]
