"""Adaptive: draw in waves, stop when another candidate is not expected to pay. The decision is in `stopping.py`.

`best_of` is the most that is drawn; only a best reward under `min_reward` is a reason to go on, up to `max_candidates`.
"""

from __future__ import annotations

from proxy.drawing import Job
from proxy.prompts import PromptPart
from proxy.strategies.contest import Contest, Terms, opened
from proxy.strategies.outcome import Outcome
from proxy.strategies.stopping import next_wave


async def run(terms: Terms, part: PromptPart, job: Job) -> Outcome:
    """Raises `UpstreamFailedError`, `DeadlineError`, `RewardUnavailableError`."""
    wave_size = terms.route.wave_size
    async with opened("adaptive", terms, part, job) as contest:
        # No fewer than the answer needs.
        count = min(max(wave_size, contest.least), terms.ask.best_of)
        while count > 0:
            await contest.draw(count)
            count = _next(contest, wave_size)
        contest.require_answers()
        await contest.draw_until_accepted(wave_size)
        return await contest.settle()


def _next(contest: Contest, wave_size: int) -> int:
    """Candidates of the next wave; 0 to stop."""
    terms, drawn = contest.terms, len(contest.judged)
    most = min(wave_size, terms.ask.best_of - drawn)
    if most <= 0 or contest.drawing_is_over or not contest.scored:
        return 0
    if contest.num_answered == 0:
        return 0  # The upstream refuses or is down: another wave would only ask again.
    if contest.num_answered < contest.least:
        return most
    if terms.min_reward is not None:
        accepted = contest.select().accepted
        if not accepted:
            return most
        if terms.route.stop_at_min_reward:
            return 0
    rewards = contest.rewards()
    prior = terms.history.prior()
    return next_wave(rewards, drawn, prior, most=most, n=terms.ask.n, stop_cost=terms.route.stop_cost)
