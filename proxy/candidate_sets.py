"""A result as candidate sets for the feedback store: one a prompt. Not redacted yet; holds no bytes of the upstream."""

from __future__ import annotations

import time
from typing import Any, cast

from feedback.judgements import CandidateSet, StoredCandidate
from feedback.records import Message
from proxy.candidates import Judged
from proxy.facts import Facts
from proxy.prompts import PromptPart
from proxy.response import Result
from proxy.strategies.outcome import Outcome

_SAMPLING = (
    "temperature", "top_p", "max_tokens", "max_completion_tokens", "max_output_tokens", "stop", "seed",
    "frequency_penalty", "presence_penalty", "response_format", "tools", "tool_choice", "reasoning_effort",
)  # fmt: skip
"""Fields of a request that shape what is generated."""
_EMPTY: Message = {"role": "assistant", "content": None}


def candidate_sets(result: Result, facts: Facts) -> tuple[list[CandidateSet], int]:
    """The sets, and roughly the bytes that they hold.

    Several prompts share a completion id: the second's set has it with `.1` at its end, and so on.
    """
    created = time.time()
    sets = [
        _candidate_set(result, facts, position, part, outcome, created)
        for position, (part, outcome) in enumerate(zip(result.ask.parts, result.outcomes, strict=True))
    ]
    text = sum(len(one.candidate.content or "") for outcome in result.outcomes for one in outcome.judged)
    return sets, facts.request_bytes + text


def _candidate_set(
    result: Result, facts: Facts, position: int, part: PromptPart, outcome: Outcome, created: float
) -> CandidateSet:
    ask = result.ask
    return CandidateSet(
        completion_id=result.completion_id if position == 0 else f"{result.completion_id}.{position}",
        created=created,
        route=facts.route,
        endpoint=facts.endpoint,
        model=ask.model,
        reward_model=result.reward_model,
        strategy=outcome.strategy,
        prompt=part.messages,
        candidates=[_stored(one) for one in outcome.judged],
        winner=outcome.best.candidate.index,
        accepted=outcome.accepted,
        policy=_policy(result, facts, outcome),
    )


def _stored(one: Judged) -> StoredCandidate:
    candidate, score = one.candidate, one.score
    failed = candidate.failure is not None
    return StoredCandidate(
        index=candidate.index,
        message=_EMPTY if failed else cast("Message", candidate.message),
        valid=one.invalid_reason is None,
        reason=one.invalid_reason,
        reward=score.reward if score is not None else None,
        raw_reward=score.raw_reward if score is not None else None,
        percentile=score.percentile if score is not None else None,
        finish_reason=candidate.finish_reason,
        usage=candidate.own_usage,
        failed=failed,
        std=score.std if score is not None else None,
        objectives=score.objectives if score is not None else None,
    )


def _policy(result: Result, facts: Facts, outcome: Outcome) -> dict[str, Any]:
    ask, bill = result.ask, result.bill
    return {
        "best_of": ask.best_of,
        "n": ask.n,
        "min_reward": ask.min_reward,
        "action": outcome.action,
        "scored": outcome.scored,
        "sampling": {name: ask.body[name] for name in _SAMPLING if ask.body.get(name) is not None},
        "usage": bill.tokens.described() | {"estimated": bill.tokens.estimated, "cost": bill.cost},
        "request_id": facts.request_id,
        "key": facts.key,
    }
