"""The scoring service's other tongues: paths and shapes of engines that people already run (`reward/protocols.py`)."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from starlette.types import Receive, Scope, Send

from feedback.records import Messages
from proxy.admission import client_left, while_client_waits
from proxy.errors import RewardUnavailableError
from proxy.exchange import exchange_of
from proxy.headers import raw
from proxy.routes.models import send_list
from proxy.routes.posted import posted_object
from proxy.routes.score import scoring_errors
from reward.protocols import READERS, Asked, Conversation
from reward.scorer import Score, Scorer, TemplatedText

PATHS = frozenset(READERS)
_AT_ONCE = 128
"""Prompts of one request: a longer list must not fill the scorer's queue by itself, and be turned away."""


async def scoring(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application for all of `PATHS`."""
    gateway = exchange_of(scope).gateway
    async with posted_object(scope, receive) as body:
        with scoring_errors():
            asked = READERS[scope["path"]](body)
        scorer = _scorer(gateway.scorers, gateway.routing.default.scorer, body)
        await while_client_waits(client_left(receive), _answer(scorer, asked, send))


async def models(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application: the reward models, for clients that look before they ask."""
    await send_list([scorer.name for scorer in exchange_of(scope).gateway.scorers.values()], send)


def _scorer(scorers: Mapping[str, Scorer], default: Scorer | None, body: Mapping[str, Any]) -> Scorer:
    """The one that `model` names; else the default one, since each engine has names of its own for the only model."""
    name = body.get("model")
    by_name = {scorer.name: scorer for scorer in scorers.values()} | dict(scorers)
    found = by_name.get(name, default) if isinstance(name, str) else default
    if found is None:
        raise RewardUnavailableError("No reward model is configured on this server")
    return found


async def _answer(scorer: Scorer, asked: Asked, send: Send) -> None:
    with scoring_errors():
        scores = await _scores(scorer, asked)
    body = orjson.dumps(asked.reply(scores, scorer.name))
    head = {"content-type": "application/json", "content-length": str(len(body))}
    await send({"type": "http.response.start", "status": 200, "headers": raw(head)})
    await send({"type": "http.response.body", "body": body})


async def _scores(scorer: Scorer, asked: Asked) -> Sequence[Score]:
    """One an item, in order."""
    texts = [(position, item) for position, item in enumerate(asked.items) if isinstance(item, TemplatedText)]
    talks = [(position, item) for position, item in enumerate(asked.items) if isinstance(item, Conversation)]
    scores: dict[int, Score] = {}

    async def score_texts() -> None:
        found = await scorer.score_texts([item for _, item in texts])
        scores.update(zip((position for position, _ in texts), found, strict=True))

    places = asyncio.Semaphore(_AT_ONCE)

    async def score_talks(prompt: Messages, positions: Sequence[int], completions: Sequence[Messages]) -> None:
        async with places:
            scores.update(zip(positions, await scorer.score(prompt, completions), strict=True))

    try:
        async with asyncio.TaskGroup() as group:
            if texts:
                group.create_task(score_texts())
            # Neighbours with one prompt, as in a reranking, are scored as its candidates.
            for prompt, run in itertools.groupby(talks, key=lambda talk: talk[1].prompt):
                same = list(run)
                group.create_task(
                    score_talks(prompt, [place for place, _ in same], [one.completion for _, one in same])
                )
    except* Exception as failures:
        raise failures.exceptions[0] from failures
    return [scores[position] for position in range(len(asked.items))]
