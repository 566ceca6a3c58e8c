"""For those who run the server: alive, ready, metrics."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client import generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from proxy.gateway import Gateway

PATHS = frozenset({"/healthz", "/readyz", "/metrics", "/docs", "/openapi.json"})


class Health(BaseModel):
    status: str


class Readiness(BaseModel):
    ready: bool
    upstream: bool
    reward_models: dict[str, bool]


def operations(gateway: Gateway) -> APIRouter:
    router = APIRouter(tags=["operations"])

    @router.get("/healthz", summary="The process is alive")
    async def healthz() -> Health:
        return Health(status="ok")

    @router.get("/readyz", summary="Upstream and reward models can answer now", responses={503: {"model": Readiness}})
    async def readyz(response: Response) -> Readiness:
        upstream = await gateway.upstream.ready()
        reward_models = {scorer.name: scorer.ready for scorer in gateway.scorers.values()}
        ready = upstream and all(reward_models.values())
        response.status_code = 200 if ready else 503
        return Readiness(ready=ready, upstream=upstream, reward_models=reward_models)

    @router.get("/metrics", summary="Prometheus text", response_class=Response)
    async def metrics() -> Response:
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return router
