"""Outcomes into answers: body, usage, headers, the `winnow` object. Pure. Streams are in `replay`."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import orjson

from proxy.candidates import Candidate, Judged
from proxy.headers import of_winner
from proxy.ledger import Bill, Tokens
from proxy.refusal import refusal
from proxy.request import Ask
from proxy.responses_output import usage_in_own_names
from proxy.strategies.outcome import Outcome

FALLBACK_HEADER = "x-winnow-fallback"


@dataclass(frozen=True, slots=True)
class Result:
    """All that is known when a request's winners are: one outcome a prompt."""

    ask: Ask
    outcomes: Sequence[Outcome]
    reward_model: str | None
    refusal: str
    completion_id: str
    elapsed_s: float
    """From the request's arrival to its winners."""
    bill: Bill
    """All that was spent upstream, with what had to be estimated."""
    winner_tokens: Tokens
    """What the winners alone cost."""
    fallback: str | None = None
    """The route that stood in for the one that was asked for."""

    @property
    def winners(self) -> list[tuple[int, Candidate]]:
        """With their index in `choices`: prompt × n + rank. A refusal takes the place of what it refuses."""
        return [
            (prompt * self.ask.n + rank, winner)
            for prompt, outcome in enumerate(self.outcomes)
            for rank, winner in enumerate(self._winners_of(outcome))
        ]

    @property
    def usage(self) -> dict[str, Any] | None:
        """What the upstream bills for all that was generated; None if it never said."""
        calls = {id(call): call for outcome in self.outcomes for call in outcome.calls}.values()
        return sum_usage([call.usage for call in calls if call.usage is not None])

    @property
    def overhead_s(self) -> float:
        return max(0.0, self.elapsed_s - max(outcome.upstream_s for outcome in self.outcomes))

    def _winners_of(self, outcome: Outcome) -> Iterator[Candidate]:
        best = [outcome.judged[position].candidate for position in outcome.order[: self.ask.n]]
        if outcome.action == "refuse":
            yield from (
                refusal(self.ask, self.refusal, refused, f"{self.completion_id}-{i}") for i, refused in enumerate(best)
            )
        else:
            yield from best


def sum_usage(usages: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Numbers added up, details too; anything else is taken from the last that has it."""
    total: dict[str, Any] = {}
    for usage in usages:
        for name, value in usage.items():
            before = total.get(name)
            if type(value) is int and type(before) is int:  # the usual case, told from others at little cost
                total[name] = before + value
            elif isinstance(value, dict):
                total[name] = sum_usage([before, value] if isinstance(before, dict) else [value])
            elif isinstance(value, int | float) and isinstance(before, int | float) and not isinstance(value, bool):
                total[name] = before + value
            elif value is not None or name not in total:
                total[name] = value
    return total or None


def body(result: Result) -> bytes:
    winners = result.winners
    _, first = winners[0]
    if result.ask.endpoint == "responses":
        return orjson.dumps(response_object(result, first))
    answer = dict(first.answer)
    answer["choices"] = [dict(winner.choice) | {"index": index} for index, winner in winners]
    if (usage := result.usage) is not None:
        answer["usage"] = usage
    if result.ask.return_candidates:
        answer["winnow"] = winnow_object(result)
    return orjson.dumps(answer)


def response_object(result: Result, winner: Candidate) -> dict[str, Any]:
    """The winner's response of the Responses API, with what was spent for it."""
    response = dict(winner.answer)
    if (usage := result.usage) is not None:
        response["usage"] = usage_in_own_names(usage)
    if result.ask.return_candidates:
        response["winnow"] = winnow_object(result)
    return response


def headers(result: Result) -> dict[str, str]:
    judged = [one for outcome in result.outcomes for one in outcome.judged]
    best = result.outcomes[0].best
    calls = [call.headers for outcome in result.outcomes for call in outcome.calls]
    answer = of_winner(best.candidate.call.headers, calls) | {
        "x-winnow-best-of": str(result.ask.best_of),
        "x-winnow-candidates": counts_header(judged),
        "x-winnow-strategy": result.outcomes[0].strategy,
        "x-winnow-accepted": _flag(all(outcome.accepted for outcome in result.outcomes)),
        "x-winnow-scored": _flag(all(outcome.scored for outcome in result.outcomes)),
        "x-winnow-upstream-calls": str(result.bill.num_calls),
        "x-winnow-completion-id": result.completion_id,
        "x-winnow-overhead-ms": f"{result.overhead_s * 1000:.1f}",
    }
    if result.ask.held_by is not None:
        answer["x-winnow-held-by"] = result.ask.held_by
    if result.fallback is not None:
        answer[FALLBACK_HEADER] = result.fallback
    if best.score is not None:
        answer["x-winnow-reward"] = f"{best.score.reward:.6g}"
    if result.bill.cost is not None:
        answer["x-winnow-cost"] = f"{result.bill.cost:.8f}"
    if result.bill.tokens.estimated:
        answer["x-winnow-usage-estimated"] = "true"
    return answer


def live_headers(
    ask: Ask, upstreams: Sequence[Mapping[str, str]], num_calls: int, completion_id: str
) -> dict[str, str]:
    """Of a winner that is still being written. `upstreams` are answers' headers, the winner's first."""
    return of_winner(upstreams[0], upstreams) | {
        "x-winnow-best-of": str(ask.best_of),
        "x-winnow-strategy": ask.strategy,
        "x-winnow-upstream-calls": str(num_calls),
        "x-winnow-completion-id": completion_id,
    }


def counts_header(judged: Sequence[Judged]) -> str:
    counts = f"s={len(_scored(judged))};f={len(_failed(judged))};i={len(_invalid(judged))}"
    num_given_up = sum(map(_was_given_up, judged))
    return f"{counts};p={num_given_up}" if num_given_up else counts


def winnow_object(result: Result) -> dict[str, Any]:
    several = len(result.outcomes) > 1
    candidates = [
        _described(one, None if not several else prompt)
        for prompt, outcome in enumerate(result.outcomes)
        for one in outcome.judged
    ]
    first = result.outcomes[0]
    return {
        "candidates": candidates,
        "winner": first.best.candidate.index,
        "winners": [
            [outcome.judged[position].candidate.index for position in outcome.order[: result.ask.n]]
            for outcome in result.outcomes
        ],
        "accepted": all(outcome.accepted for outcome in result.outcomes),
        "scored": all(outcome.scored for outcome in result.outcomes),
        "action": first.action,
        "strategy": first.strategy,
        "best_of": result.ask.best_of,
        "reward_model": result.reward_model,
        "completion_id": result.completion_id,
        "held_by": result.ask.held_by,
        "usage": {
            "winner": result.winner_tokens.described(),
            "total": result.bill.tokens.described(),
            "estimated": result.bill.tokens.estimated,
            "cost": result.bill.cost,
        },
    }


def new_completion_id() -> str:
    return f"winnow-{uuid.uuid4().hex}"


def _scored(judged: Sequence[Judged]) -> list[Judged]:
    return [one for one in judged if one.score is not None and one.invalid_reason is None]


def _failed(judged: Sequence[Judged]) -> list[Judged]:
    return [one for one in judged if one.candidate.failure is not None and not _was_given_up(one)]


def _was_given_up(one: Judged) -> bool:
    """It did not fail: others were better, or enough."""
    return one.candidate.failure is not None and one.candidate.failure.reason in ("quorum", "pruned")


def _invalid(judged: Sequence[Judged]) -> list[Judged]:
    return [one for one in judged if one.candidate.failure is None and one.invalid_reason is not None]


def _flag(value: bool) -> str:
    return "true" if value else "false"


def _described(one: Judged, prompt: int | None) -> dict[str, Any]:
    candidate = one.candidate
    described: dict[str, Any] = {
        "index": candidate.index,
        "content": candidate.content if candidate.failure is None or _was_given_up(one) else None,
        "reward": one.score.reward if one.score else None,
        "percentile": one.score.percentile if one.score else None,
        "valid": one.invalid_reason is None,
        "reason": one.invalid_reason,
        "finish_reason": candidate.finish_reason,
        "usage": candidate.own_usage,
    }
    if one.score is not None:
        described |= {"raw_reward": one.score.raw_reward, "truncated": one.score.truncated, **one.score.by_heads()}
    if tool_calls := candidate.message.get("tool_calls"):
        described["tool_calls"] = tool_calls
    if prompt is not None:
        described["prompt"] = prompt
    return described
