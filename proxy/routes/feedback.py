"""`POST /v1/feedback`: what people say of a served completion, tied to the candidates it was chosen from."""

from __future__ import annotations

import logging
from typing import Annotated, Any

import orjson
from pydantic import BaseModel, ConfigDict, Field
from starlette.types import Receive, Scope, Send

from feedback.judgements import CandidateSet, Judgement, StoredJudgement, StoreError
from proxy.admission import client_left, while_client_waits
from proxy.errors import BadRequestError, FeedbackUnavailableError, NotFoundError
from proxy.exchange import exchange_of
from proxy.headers import raw
from proxy.metrics import ProxyMetrics
from proxy.recorder import Recorder
from proxy.request import check
from proxy.routes.posted import posted_object

_log = logging.getLogger(__name__)

PATH = "/v1/feedback"
_JUDGEMENTS = ("rating", "preferred", "ranking", "correction", "labels", "comment")
_Index = Annotated[int, Field(ge=0)]


class FeedbackRequest(BaseModel):
    """A judgement of one served completion. `completion_id` is that of `x-winnow-completion-id`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    completion_id: str = Field(pattern=r"^[A-Za-z0-9._-]{1,128}$")
    rating: Annotated[int, Field(ge=-1, le=7)] | None = None
    preferred: _Index | None = None
    ranking: list[list[_Index]] | None = None
    correction: Annotated[str, Field(min_length=1)] | None = None
    labels: dict[str, Any] | None = None
    comment: str | None = None
    annotator: Annotated[str, Field(min_length=1, max_length=256)] | None = None


async def feedback(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application."""
    gateway = exchange_of(scope).gateway
    async with posted_object(scope, receive) as body:
        request = check(FeedbackRequest, body)
        if all(getattr(request, name) is None for name in _JUDGEMENTS):
            raise BadRequestError(f"Says nothing of the completion: give one of {', '.join(_JUDGEMENTS)}")
        if gateway.recorder is None:
            raise NotFoundError("This server keeps no candidates to judge: log_candidates is off")
        await while_client_waits(client_left(receive), _answer(gateway.recorder, gateway.metrics, request, send))


async def _answer(recorder: Recorder, metrics: ProxyMetrics, request: FeedbackRequest, send: Send) -> None:
    try:
        candidate_set = await recorder.candidate_set(request.completion_id)
        if candidate_set is None:
            raise NotFoundError("No completion with this id is stored", param="completion_id")
        _check(request, candidate_set)
        stored = await recorder.judge(Judgement(**request.model_dump()))
    except StoreError as error:
        _log.warning("A judgement could not be stored: %s", error)
        raise FeedbackUnavailableError(
            "The feedback store cannot be reached now; nothing was stored", headers={"retry-after": "1"}
        ) from error
    _count(request, stored, metrics)
    body = orjson.dumps({
        "id": stored.id,
        "object": "feedback",
        "completion_id": request.completion_id,
        "created": int(stored.created),
        "repeated": stored.repeated,
    })  # fmt: skip
    head = {"content-type": "application/json", "content-length": str(len(body))}
    await send({"type": "http.response.start", "status": 200, "headers": raw(head)})
    await send({"type": "http.response.body", "body": body})


def _count(request: FeedbackRequest, stored: StoredJudgement, metrics: ProxyMetrics) -> None:
    if not stored.repeated:
        for name in _JUDGEMENTS:
            if getattr(request, name) is not None:
                metrics.feedback.labels(name).inc()


def _check(request: FeedbackRequest, candidate_set: CandidateSet) -> None:
    """Raises `BadRequestError` for what the candidates do not have."""
    answered = {one.index for one in candidate_set.candidates if not one.failed}
    if request.preferred is not None:
        _check_index(request.preferred, answered, "preferred")
    if request.ranking is None:
        return
    ranked = [index for group in request.ranking for index in group]
    for index in ranked:
        _check_index(index, answered, "ranking")
    if len(set(ranked)) < len(ranked):
        raise BadRequestError("ranking: a candidate stands in it twice", param="ranking")
    if len(ranked) < 2 or not all(request.ranking):
        raise BadRequestError("ranking: needs two candidates or more, and no empty group", param="ranking")


def _check_index(index: int, answered: set[int], param: str) -> None:
    if index not in answered:
        known = ", ".join(map(str, sorted(answered))) or "none"
        raise BadRequestError(f"{param}: {index} is no candidate of this completion; there is: {known}", param=param)
