"""One prompt's candidates while they are drawn, judged and chosen from: what all strategies do alike."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field, replace

from proxy.broadcast import Broadcast
from proxy.candidates import Call, Draw, Judged
from proxy.config import OnReject, RouteSettings
from proxy.drawing import Drawer, Job, is_past
from proxy.judging import Hearing, Judge
from proxy.patience import Patience
from proxy.prompts import PromptPart
from proxy.request import Ask
from proxy.selection import Selection, adjusted_reward, select
from proxy.strategies.history import LatestValues, RewardHistory
from proxy.strategies.outcome import Outcome, all_failed
from proxy.strategies.settings import StrategyName

_SCORING_SHARE = 0.2
_SCORING_RESERVE_S = 1.0
"""The end of a deadline that drawing leaves to scoring: this share of it, this much at most."""


@dataclass(frozen=True, slots=True)
class Terms:
    """What holds for all of one request's prompts."""

    ask: Ask
    route: RouteSettings
    drawer: Drawer
    judge: Judge
    history: RewardHistory
    """Of the route and the reward model: read, and added to."""
    durations: LatestValues
    """Of the route: as `history`."""
    min_reward: float | None
    """With percentiles resolved."""
    started_at: float
    """Loop time at which the request came in."""
    outlasts_deadline: bool = False
    """Whoever waits keeps the deadline; the work goes on to its first answers, for a retry to join."""
    broadcast: Broadcast | None = None
    """Where a winner can go while it is being written; None if all has to be known first."""


@contextlib.asynccontextmanager
async def opened(strategy: StrategyName, terms: Terms, part: PromptPart, job: Job) -> AsyncIterator[Contest]:
    """A contest; what it left under way is ended with the block."""
    async with terms.judge.hearing(part) as hearing:
        yield Contest(strategy, terms, hearing, job)


@dataclass(slots=True)
class Contest:
    """The candidates of one prompt so far. A strategy draws into it and settles it."""

    strategy: StrategyName
    terms: Terms
    hearing: Hearing
    job: Job
    judged: list[Judged] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    num_calls: int = 0
    upstream_s: float = 0.0
    scored: bool = True

    async def draw(self, count: int) -> None:
        """One round: `count` candidates, drawn and judged. Raises `RewardUnavailableError`."""
        learns = not self.judged
        verdict = await self._round(self.job, count, self.patience(count))
        # Later rounds are drawn because earlier rewards were low: they would not be a fair sample.
        if learns and self.scored:
            self.terms.history.observe(self._rewards(verdict))

    async def draw_until_accepted(self, round_size: int) -> None:
        """More rounds while the best is under `min_reward`, up to `max_candidates`."""
        while self.scored and self._may_draw_more() and not self.select().accepted:
            await self.draw(min(round_size, self.terms.ask.max_candidates - len(self.judged)))

    async def settle(self, chosen: int | None = None) -> Outcome:
        """The choice among what was drawn, after what a rejection leads to.

        `chosen` is a position in `judged` that the client has got already.
        """
        selection = self.select()
        if chosen is not None:
            others = (position for position in selection.order if position != chosen)
            selection = Selection((chosen, *others), self.judged[chosen].invalid_reason is None)
        # An unscored winner is marked as such; there is no reward to reject it by.
        rejected = self.terms.min_reward is not None and self.scored and not selection.accepted
        action: OnReject | None = self.terms.ask.on_reject if rejected else None
        if action == "fallback":
            selection = await self._fall_back(selection)
        return Outcome(
            strategy=self.strategy,
            judged=tuple(self.judged),
            order=selection.order,
            accepted=selection.accepted,
            scored=self.scored,
            action=action,
            calls=tuple(self.calls),
            num_calls=self.num_calls,
            upstream_s=self.upstream_s,
        )

    def add(self, draw: Draw, judged: Sequence[Judged], *, scored: bool) -> None:
        """What one round brought."""
        self.judged.extend(judged)
        self.calls.extend(draw.calls)
        self.num_calls += draw.num_calls
        self.upstream_s += draw.upstream_s
        self.scored = self.scored and scored

    def require_answers(self) -> None:
        """Raises `UpstreamFailedError` or `DeadlineError` when too few candidates answered."""
        # Fewer candidates may have been asked for than the setting demands.
        if self.num_answered < min(self.least, len(self.judged)):
            raise all_failed([one.candidate for one in self.judged], self.terms.ask.deadline_s)

    def select(self) -> Selection:
        return self._select(self.judged)

    def rewards(self) -> list[float]:
        """Of the valid candidates, less penalties: what the choice goes by."""
        return self._rewards(self.judged)

    @property
    def least(self) -> int:
        """Answered candidates that the request cannot do without."""
        return max(self.terms.route.min_candidates, self.terms.ask.n)

    @property
    def num_answered(self) -> int:
        return sum(one.candidate.failure is None for one in self.judged)

    @property
    def drawing_is_over(self) -> bool:
        return is_past(self.drawing_deadline)

    @property
    def deadline(self) -> float | None:
        """In the loop's time, scoring included."""
        return None if self.terms.ask.deadline_s is None else self.terms.started_at + self.terms.ask.deadline_s

    @property
    def drawing_deadline(self) -> float | None:
        if self.terms.ask.deadline_s is None or self.deadline is None:
            return None
        return self.deadline - min(_SCORING_RESERVE_S, _SCORING_SHARE * self.terms.ask.deadline_s)

    def patience(self, count: int) -> Patience:
        """With `count` candidates on their way."""
        route, ask = self.terms.route, self.terms.ask
        # What is still missing for the request, whatever the quorum says.
        quorum = None if ask.quorum is None else max(ask.quorum, self.least - self.num_answered)
        return Patience(
            quorum=quorum if quorum is not None and quorum < count else None,
            straggler_factor=route.straggler_factor,
            straggler_min_s=route.straggler_min_s,
            least=self.least - self.num_answered,
            is_good=self.hearing.is_valid,
            learnt_factor=route.straggler_learnt_factor,
            durations=self.terms.durations,
            outlasts_deadline=self.terms.outlasts_deadline and self.least > self.num_answered,
        )

    async def _round(self, job: Job, count: int, patience: Patience) -> Sequence[Judged]:
        hearing, first_index, deadline = self.hearing, len(self.judged), self.drawing_deadline
        draw = await self.terms.drawer.draw(job, count, first_index, deadline, patience, hearing.arrived)
        late = self.terms.outlasts_deadline and is_past(self.deadline)
        verdict = await hearing.judge(draw.candidates, None if late else self.deadline)
        self.add(draw, verdict.judged, scored=verdict.scored)
        return verdict.judged

    async def _fall_back(self, rejected: Selection) -> Selection:
        """The best of the fallback model; of the rejected ones, if the fallback brings nothing."""
        model, count = self.terms.route.fallback_model, self.terms.ask.best_of
        before = len(self.judged)
        job = replace(self.job, model=model, body=dict(self.job.body) | {"model": model})
        # Another model takes another time: the route's says nothing of it, nor it of the route's.
        patience = replace(self.patience(count), durations=None)
        selection = self._select(await self._round(job, count, patience))
        if not selection.order:
            return rejected
        return Selection(tuple(before + position for position in selection.order), selection.accepted)

    def _may_draw_more(self) -> bool:
        if self.terms.min_reward is None or len(self.judged) >= self.terms.ask.max_candidates:
            return False
        return not self.drawing_is_over

    def _select(self, judged: Sequence[Judged]) -> Selection:
        return select(judged, truncation_penalty=self.terms.route.truncation_penalty, min_reward=self.terms.min_reward)

    def _rewards(self, judged: Sequence[Judged]) -> list[float]:
        penalty = self.terms.route.truncation_penalty
        valid = [one for one in judged if one.invalid_reason is None and one.score is not None]
        return [adjusted_reward(one, penalty) for one in valid]
