"""Speculative: open all streams at once, compare the answers' beginnings at growing lengths, cancel the worse ones.

Which to go on with, `pruning.py` decides. The last one left is relayed to a streaming client while it is written, if
nothing can be found out at its end that would have to be known before.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
from dataclasses import replace
from functools import partial

from proxy.candidates import CallEnd, CallFailure, Candidate, Draw
from proxy.chat_chunks import as_plain, with_text
from proxy.drafts import Draft
from proxy.drawing import DEADLINE_PASSED, NOT_WAITED_FOR, Job, bodies_of
from proxy.errors import WinnerLostError
from proxy.prompts import PromptPart
from proxy.strategies.contest import Contest, Terms, opened
from proxy.strategies.outcome import Outcome
from proxy.strategies.pruning import beginning, survivors
from proxy.validity import Rules
from reward.errors import RewardError

_log = logging.getLogger(__name__)


async def run(terms: Terms, part: PromptPart, job: Job) -> Outcome:
    """Raises `UpstreamFailedError`, `DeadlineError`, `RewardUnavailableError`, `WinnerLostError`."""
    async with opened("speculative", terms, part, job) as contest:
        race = _Race(contest, replace(job, stream=True))
        await race.run()
        draw = race.result()
        verdict = await contest.hearing.judge(draw.candidates, race.judging_deadline)
        contest.add(draw, verdict.judged, scored=verdict.scored)
        if race.live is not None:
            return await contest.settle(chosen=_unbroken(contest, race.live))
        if contest.num_answered == 0 and race.num_pruned and not contest.drawing_is_over:
            await contest.draw(contest.least)  # The last ones left broke off, and it was we who ended the others.
        contest.require_answers()
        await contest.draw_until_accepted(terms.ask.best_of)
        return await contest.settle()


def _unbroken(contest: Contest, position: int) -> int:
    failure = contest.judged[position].candidate.failure
    if failure is not None:
        raise WinnerLostError(f"The chosen answer broke off after the others were given up: {failure.message}")
    return position


class _Race:
    """All streams of one prompt. Positions are those of its drafts."""

    def __init__(self, contest: Contest, job: Job) -> None:
        self._contest = contest
        self._terms, self._route = contest.terms, contest.terms.route
        self._job = job
        # Written before anything starts: what cannot be written is the request's fault, not a candidate's.
        self._bodies = bodies_of(job, contest.terms.ask.best_of)
        self._echo = contest.hearing.echoed
        count = contest.terms.ask.best_of
        self._drafts = [Draft(position, partial(self._grew, position)) for position in range(count)]
        self._done: dict[int, Candidate] = {}
        self._given_up: dict[int, CallFailure] = {}
        self._contenders = list(range(count))
        self._patience = contest.patience(count)
        self._tasks: list[asyncio.Task[None]] = []
        self._target = 0
        self._news = asyncio.Event()
        self._scope = asyncio.timeout_at(contest.deadline)
        self._straggling: asyncio.TimerHandle | None = None
        self._loop = asyncio.get_running_loop()
        self._started_at = self._loop.time()
        self.live: int | None = None
        """The one that is relayed as it is written."""

    async def run(self) -> None:
        """Ends when no stream is open any more."""
        try:
            async with self._scope, asyncio.TaskGroup() as group:
                for draft in self._drafts:
                    self._tasks.append(group.create_task(self._draw(draft)))
                await self._prune()
                self._scope.reschedule(self._contest.drawing_deadline)
                await self._go_live()
        except TimeoutError:
            pass  # What is there competes; what is missing failed.
        finally:
            self._stop_timer()

    def result(self) -> Draw:
        drawn = [self._result_of(position, draft) for position, draft in enumerate(self._drafts)]
        return Draw(drawn, [one.call for one in drawn], len(drawn))

    @property
    def num_pruned(self) -> int:
        return len(self._given_up)

    @property
    def judging_deadline(self) -> float | None:
        """None for a live answer: the client has it already, and waits for nothing but its end."""
        return self._contest.deadline if self.live is None else None

    def _result_of(self, position: int, draft: Draft) -> Candidate:
        done = self._done.get(position)
        if done is None:
            return draft.given_up(self._given_up.get(position, DEADLINE_PASSED))
        return done if self._terms.ask.stream else as_plain(done, self._job.endpoint)

    async def _draw(self, draft: Draft) -> None:
        body = self._bodies[draft.index]
        one = await self._terms.drawer.draw_one(self._job, body, draft, self._contest.drawing_deadline)
        self._done[draft.index] = one
        self._contest.hearing.arrived(one)
        if one.failure is None:
            self._patience.learn(self._loop.time() - self._started_at)
        elif draft.index in self._contenders and self.live is None:
            self._contenders.remove(draft.index)
        self._watch_stragglers()
        self._news.set()

    def _grew(self, position: int) -> None:
        if position == self.live and self._terms.broadcast is not None:
            self._terms.broadcast.wake()
        elif self._length(position) >= self._target:
            self._news.set()

    async def _prune(self) -> None:
        """Compares at growing lengths until few enough are left, or all have ended."""
        length = float(self._route.prune_first_chars)
        least = self._contest.least
        while self._running() and len(self._contenders) > least:
            in_time = await self._reached(int(length))
            if not self._running():
                return
            rewards = await self._rewards(int(length))
            if rewards is None:
                return
            if in_time:
                kept = survivors(rewards, keep=self._route.prune_keep, least=least)
            elif self._may_go_live:
                kept = survivors(rewards, keep=0.0, least=1)  # Better the best beginning than no answer in time.
            else:
                return
            self._keep(kept)
            length *= self._route.prune_growth

    async def _reached(self, length: int) -> bool:
        """Until all that run have come so far, or half of all and a while; False if the deadline came first."""
        self._target = length
        lag_until: float | None = None
        deadline = self._contest.drawing_deadline
        while waiting := [position for position in self._running() if self._length(position) < length]:
            now = self._loop.time()
            if deadline is not None and now >= deadline:
                return False
            if lag_until is None and 2 * len(waiting) <= len(self._contenders):
                lag_until = now + self._route.prune_lag_s
            if lag_until is not None and now >= lag_until:
                return True
            await self._await_news(min((end for end in (lag_until, deadline) if end is not None), default=None))
        return True

    async def _await_news(self, until: float | None) -> None:
        self._news.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(until):
                await self._news.wait()

    async def _rewards(self, length: int) -> dict[int, float] | None:
        """By contender: of an ended answer its own, of an open one that of its beginning; None without a scorer."""
        texts = {position: self._seen(position, length) for position in self._contenders}
        seen = {position: text for position, text in texts.items() if text is not None}
        try:
            scores = await self._contest.hearing.scorebook.scores(list(seen.values()), self._contest.deadline)
        except (RewardError, TimeoutError) as error:
            _log.warning("Beginnings cannot be compared, so that all answers are awaited: %s", error)
            return None
        rewards = {position: score.reward for position, score in zip(seen, scores, strict=True)}
        # What has said nothing while the others wrote comes last; what failed meanwhile is no contender any more.
        return {position: rewards.get(position, -math.inf) for position in texts if position in self._contenders}

    def _seen(self, position: int, length: int) -> Candidate | None:
        """What is there to score of one contender; None if it is nothing."""
        done = self._done.get(position)
        if done is not None:
            return done
        so_far = self._drafts[position].so_far()
        text = (so_far.content or "").removeprefix(self._echo)
        start = beginning(text, length)
        return with_text(so_far, self._echo + start) if start.strip() else None

    def _keep(self, kept: list[int]) -> None:
        for position in self._contenders:
            if position not in kept and position not in self._done:
                reached = self._length(position)
                self._end(position, CallFailure("pruned", f"Not among the best after {reached} characters"), "pruned")
        self._contenders = kept
        self._watch_stragglers()

    def _end(self, position: int, why: CallFailure, ending: CallEnd) -> None:
        self._given_up[position] = why
        self._drafts[position].ending = ending
        self._tasks[position].cancel()

    def _watch_stragglers(self) -> None:
        """Ends what is still open when a quorum is there, or half are settled and the rest takes far longer."""
        good = [position for position, one in self._done.items() if one.failure is None]
        ask, least = self._terms.ask, self._contest.least
        if self.live is not None or len(good) < least or not self._running():
            return
        if ask.quorum is not None and sum(map(self._is_valid, good)) >= max(ask.quorum, least):
            self._give_up()
        elif self._straggling is None:
            settled = len(self._done) + sum(position not in self._done for position in self._given_up)
            if 2 * settled < len(self._drafts):
                return
            limit_s = self._patience.limit_s(self._loop.time() - self._started_at, half_there=True)
            if limit_s is not None:
                self._straggling = self._loop.call_at(self._started_at + limit_s, self._give_up)

    def _give_up(self) -> None:
        for position in self._running():
            self._end(position, NOT_WAITED_FOR, "cancelled")
        self._contenders = [position for position in self._contenders if position in self._done]
        self._news.set()

    def _is_valid(self, position: int) -> bool:
        return self._contest.hearing.is_valid(self._done[position])

    @property
    def _may_go_live(self) -> bool:
        """Whether all that a client may rely on is known of an answer that is not written yet.

        Its reward and its form are not: with a least reward, a schema or tools it is judged before it is sent.
        """
        terms = self._terms
        return (
            terms.broadcast is not None
            and terms.ask.n == 1
            and terms.min_reward is None
            and terms.judge.rules == Rules()
        )

    async def _go_live(self) -> None:
        broadcast = self._terms.broadcast
        if broadcast is None or not self._may_go_live or len(self._contenders) != 1:
            return
        (position,) = self._contenders
        # Until something has come of it, it may still fail in the proper way, or be tried again.
        self._target = 0
        while self._running() and not self._drafts[position].payloads:
            await self._await_news(None)
        if not self._running():
            return
        self.live = position
        self._stop_timer()
        # It writes to the client from here on: no deadline ends it, and it cannot be begun again.
        self._scope.reschedule(None)
        self._job.retries.left = 0
        others = [draft.headers for draft in self._drafts if draft.index != self.live and draft.headers]
        broadcast.begin(self._drafts[self.live], others, len(self._drafts))

    def _running(self) -> list[int]:
        return [
            position for position in self._contenders if position not in self._done and position not in self._given_up
        ]

    def _length(self, position: int) -> int:
        return len(self._drafts[position].so_far().content or "") - len(self._echo)

    def _stop_timer(self) -> None:
        if self._straggling is not None:
            self._straggling.cancel()
            self._straggling = None
