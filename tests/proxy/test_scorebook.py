"""When candidates go to the scorer, and in how many calls; the scorer is let go on by the test."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence

import pytest

from feedback.records import Messages
from proxy.candidates import Call, Candidate
from proxy.judging import Hearing, Judge
from proxy.prompts import PromptPart
from proxy.validity import Rules
from reward.errors import QueueFullError, RewardError, ScoringError
from reward.scorer import Score
from tests.fakes.scorer import FakeScorer

WAIT_S = 20


class HeldScorer(FakeScorer):
    """Answers a call when the test lets it; the calls are kept by the texts they brought."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[str]] = []
        self.failures: list[Exception | None] = []
        """Of the next calls, first to last."""
        self.num_cancelled = 0
        self._entered = asyncio.Semaphore(0)
        self._allowed = asyncio.Semaphore(0)

    async def score(self, prompt: Messages, completions: Sequence[Messages]) -> list[Score]:
        self.calls.append([str(completion[-1]["content"]) for completion in completions])
        self._entered.release()
        failure = self.failures.pop(0) if self.failures else None
        try:
            await self._allowed.acquire()
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        if failure is not None:
            raise failure
        return await super().score(prompt, completions)

    async def entered(self) -> None:
        """Until one more call has come."""
        async with asyncio.timeout(WAIT_S):
            await self._entered.acquire()

    def allow(self, count: int = 1) -> None:
        for _ in range(count):
            self._allowed.release()


def candidate(index: int, text: str) -> Candidate:
    return Candidate(index, Call(0.0), choice={"message": {"role": "assistant", "content": text}})


@contextlib.asynccontextmanager
async def hearing(scorer: FakeScorer, rules: Rules | None = None) -> AsyncIterator[Hearing]:
    part = PromptPart([{"role": "user", "content": "Say"}])
    async with Judge(scorer, rules or Rules(), "error", strips_echo=False).hearing(part) as opened:
        yield opened


async def rewards(opened: Hearing, *candidates: Candidate) -> list[float]:
    return [one.score.reward for one in (await opened.judge(candidates, None)).judged if one.score is not None]


GOOD, BAD, SO = candidate(0, "good"), candidate(1, "bad"), candidate(2, "so")


async def test_an_early_candidate_is_scored_while_the_others_are_awaited() -> None:
    scorer = HeldScorer()
    async with hearing(scorer) as opened:
        opened.arrived(GOOD)
        await scorer.entered()
        scorer.allow(2)
        assert await rewards(opened, GOOD, BAD) == [1, -1]
        assert scorer.calls == [["good"], ["bad"]]


async def test_what_arrives_together_or_during_a_call_goes_together() -> None:
    scorer = HeldScorer()
    async with hearing(scorer) as opened:
        opened.arrived(GOOD)
        opened.arrived(BAD)
        await scorer.entered()
        for position in range(3):
            opened.arrived(candidate(2 + position, "so " * position + "so"))
            await asyncio.sleep(0)
        assert scorer.calls == [["good", "bad"]]
        scorer.allow()
        await scorer.entered()
        assert scorer.calls[1:] == [["so", "so so", "so so so"]]


async def test_what_is_asked_for_waits_for_no_early_call() -> None:
    scorer = HeldScorer()
    async with hearing(scorer) as opened:
        opened.arrived(GOOD)
        await scorer.entered()
        opened.arrived(BAD)
        judging = asyncio.create_task(rewards(opened, GOOD, BAD, SO))
        await scorer.entered()
        assert scorer.calls == [["good"], ["bad", "so"]]
        scorer.allow(2)
        assert await judging == [1, -1, 0]


async def test_the_same_words_are_scored_once_however_often_they_come() -> None:
    scorer = HeldScorer()
    scorer.allow(5)
    async with hearing(scorer) as opened:
        opened.arrived(GOOD)
        opened.arrived(candidate(3, "good"))
        await scorer.entered()
        opened.arrived(candidate(4, "good"))
        assert await rewards(opened, GOOD, candidate(3, "good"), candidate(4, "good")) == [1, 1, 1]
        assert await rewards(opened, candidate(5, "good")) == [1]
        assert scorer.calls == [["good"]]


async def test_the_invalid_wait_until_nothing_better_came() -> None:
    scorer = HeldScorer()
    scorer.allow(5)
    async with hearing(scorer, Rules(wants_json_object=True)) as opened:
        opened.arrived(GOOD)
        await asyncio.sleep(0)
        assert not scorer.calls
        assert await rewards(opened, GOOD) == [1]


@pytest.mark.parametrize("failure", [ScoringError("restarting"), QueueFullError("full")])
async def test_a_failure_before_anybody_asked_is_tried_again(failure: RewardError) -> None:
    scorer = HeldScorer()
    scorer.failures = [failure]
    scorer.allow(5)
    async with hearing(scorer) as opened:
        opened.arrived(GOOD)
        await scorer.entered()
        for _ in range(3):
            await asyncio.sleep(0)
        assert await rewards(opened, GOOD, BAD) == [1, -1]
        assert scorer.calls == [["good"], ["good", "bad"]]


async def test_a_failure_of_what_was_asked_for_is_told_once_then_tried_again() -> None:
    scorer = HeldScorer()
    scorer.failures = [ScoringError("broken")]
    async with hearing(scorer) as opened:
        opened.arrived(GOOD)
        await scorer.entered()
        asking = asyncio.create_task(opened.scorebook.scores([GOOD, BAD], None))
        await scorer.entered()
        scorer.allow(5)
        with pytest.raises(RewardError, match="broken"):
            await asking
        assert [score.reward for score in await opened.scorebook.scores([GOOD, BAD], None)] == [1, -1]
        assert scorer.calls == [["good"], ["bad"], ["good"]]


async def test_what_nobody_waits_for_any_more_is_cancelled() -> None:
    scorer = HeldScorer()
    async with hearing(scorer) as opened:
        opened.arrived(GOOD)
        await scorer.entered()
        judging = asyncio.create_task(rewards(opened, GOOD, BAD))
        await scorer.entered()
        judging.cancel()
        with pytest.raises(asyncio.CancelledError):
            await judging
        assert scorer.num_cancelled == 0, "others could still be asking"
    assert scorer.num_cancelled == 2


async def test_the_deadline_ends_the_waiting() -> None:
    scorer = HeldScorer()
    async with hearing(scorer) as opened:
        with pytest.raises(TimeoutError):
            await opened.scorebook.scores([GOOD], asyncio.get_running_loop().time())
        scorer.allow()
        assert await rewards(opened, GOOD) == [1], "the call went on"
        assert len(scorer.calls) == 1


class ExpectingScorer(FakeScorer):
    def __init__(self) -> None:
        super().__init__()
        self.expected: list[str] = []

    @contextlib.asynccontextmanager
    async def expecting(self, prompt: Messages) -> AsyncIterator[None]:
        self.expected.append(f"begin {prompt[0]['content']}")
        yield
        self.expected.append("end")


async def test_a_scorer_that_can_get_ready_is_told_what_to_expect() -> None:
    scorer = ExpectingScorer()
    async with hearing(scorer):
        assert not scorer.expected, "it is not loaded yet"
    await scorer.start()
    async with hearing(scorer) as opened:
        assert scorer.expected == ["begin Say"]
        assert await rewards(opened, GOOD) == [1]
    assert scorer.expected == ["begin Say", "end"]


async def test_or_not_where_it_would_only_be_in_the_way() -> None:
    scorer = ExpectingScorer()
    await scorer.start()
    part = PromptPart([{"role": "user", "content": "Say"}])
    async with Judge(scorer, Rules(), "error", strips_echo=False, expects=False).hearing(part) as opened:
        assert await rewards(opened, GOOD) == [1]
    assert not scorer.expected
