"""Best of N: draw all candidates at once, judge them, choose; draw more only if the best is rejected."""

from __future__ import annotations

from proxy.drawing import Job
from proxy.prompts import PromptPart
from proxy.strategies.contest import Terms, opened
from proxy.strategies.outcome import Outcome


async def run(terms: Terms, part: PromptPart, job: Job) -> Outcome:
    """Raises `UpstreamFailedError`, `DeadlineError`, `RewardUnavailableError`."""
    async with opened("best_of_n", terms, part, job) as contest:
        await contest.draw(terms.ask.best_of)
        contest.require_answers()
        await contest.draw_until_accepted(terms.ask.best_of)
        return await contest.settle()
