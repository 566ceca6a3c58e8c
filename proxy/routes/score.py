"""`POST /v1/score`: rewards for completions that somebody already has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import orjson
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from feedback.records import Messages, RecordError, parse_messages
from proxy.admission import client_left, while_client_waits
from proxy.errors import BadRequestError, OverloadedError, RewardUnavailableError
from proxy.exchange import exchange_of
from proxy.headers import raw
from proxy.request import check
from proxy.routes.posted import posted_object
from reward.errors import InputError, QueueFullError, RewardError
from reward.scorer import Score, Scorer

PATH = "/v1/score"


class ScoreRequest(BaseModel):
    """A prompt and completions of it, as texts or as messages."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    prompt: str | list[dict[str, Any]]
    completions: list[str | dict[str, Any] | list[dict[str, Any]]] = Field(min_length=1, max_length=4096)
    reward_model: str | None = None
    return_references: bool = False
    """Also the rewards that 0 %, 1 %, … 100 % of the reference completions fall under."""


async def score(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application."""
    gateway = exchange_of(scope).gateway
    async with posted_object(scope, receive) as body:
        request = check(ScoreRequest, body)
        scorer = gateway.scorer(request.reward_model, "reward_model", gateway.routing.default.scorer)
        if scorer is None:
            raise RewardUnavailableError("No reward model is configured on this server")
        await while_client_waits(client_left(receive), _answer(scorer, request, send))


async def _answer(scorer: Scorer, request: ScoreRequest, send: Send) -> None:
    scores = await _scores(scorer, *_parsed(request))
    answer: dict[str, Any] = {
        "reward_model": scorer.name,
        "scores": [
            {
                "index": index,
                "reward": score.reward,
                "raw_reward": score.raw_reward,
                "percentile": score.percentile,
                "truncated": score.truncated,
                **score.by_heads(),
            }
            for index, score in enumerate(scores)
        ],
        "usage": {
            "prompt_tokens": sum(score.prompt_tokens for score in scores),
            "completion_tokens": sum(score.completion_tokens for score in scores),
        },
    }
    if request.return_references:
        rewards = [scorer.reward_at_percentile(percent) for percent in range(101)]
        answer["references"] = None if None in rewards else rewards
    body = orjson.dumps(answer)
    head = {"content-type": "application/json", "content-length": str(len(body))}
    await send({"type": "http.response.start", "status": 200, "headers": raw(head)})
    await send({"type": "http.response.body", "body": body})


def _parsed(request: ScoreRequest) -> tuple[Messages, list[Messages]]:
    try:
        prompt = parse_messages(request.prompt, "prompt", "user")
        completions: list[Messages] = [
            parse_messages(completion, f"completions[{position}]", "assistant")
            for position, completion in enumerate(request.completions)
        ]
    except RecordError as error:
        raise BadRequestError(str(error), param=error.field) from error
    return prompt, completions


async def _scores(scorer: Scorer, prompt: Messages, completions: list[Messages]) -> list[Score]:
    with scoring_errors():
        return await scorer.score(prompt, completions)


@contextlib.contextmanager
def scoring_errors() -> Iterator[None]:
    """A reward model's errors as answers."""
    try:
        yield
    except InputError as error:
        raise BadRequestError(str(error)) from error
    except QueueFullError as error:
        retry = {"retry-after": f"{error.retry_after_s:g}"}
        raise OverloadedError(str(error), code="score_queue_full", headers=retry) from error
    except RewardError as error:
        raise RewardUnavailableError(str(error)) from error
