"""Builds the application. Its lifespan opens upstreams and scorers and closes them in reverse."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from prometheus_client import CollectorRegistry
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Scope, Send

from feedback.judgements import FeedbackStore
from feedback.redaction import Redactor
from proxy.admission import Admission, Gate
from proxy.config import RouteSettings, Settings
from proxy.dispatch import Dispatch
from proxy.drawing import Drawer
from proxy.errors import JSON, BadRequestError, InternalError, ProxyError, error_for_status
from proxy.gateway import Gateway
from proxy.joining import Joining
from proxy.keys import KeyRing
from proxy.ledger import Price
from proxy.live import Live
from proxy.metrics import ProxyMetrics
from proxy.middleware import Envelope
from proxy.openapi import describe
from proxy.origins import PageGuard, with_cors
from proxy.recorder import Recorder, RecorderLimits
from proxy.routes.operations import operations
from proxy.routing import DEFAULT, Route, RoutingTable
from proxy.strategies.history import Histories
from proxy.upstreams.base import Upstream
from proxy.upstreams.capabilities import Capabilities
from proxy.upstreams.guarded import GuardedUpstream
from reward.scorer import Scorer

_SECOND_LOOK_S = 0.5
"""Feedback may reach another worker than the one that is still writing the candidates: it does so in milliseconds."""


@dataclass(frozen=True, slots=True)
class Parts:
    """What a configuration needs from outside, by its names there; the app opens and closes it."""

    upstreams: Mapping[str, Upstream]
    scorers: Mapping[str, Scorer]
    """`default` is that of the section `reward`; without it nothing is scored by default."""
    store: FeedbackStore | None = None
    """Where routes with `log_candidates` keep theirs; None: nowhere."""
    around: Callable[[ASGIApp], ASGIApp] | None = None
    """What the application is to be wrapped in when it is made: tracing."""


@dataclass(frozen=True, slots=True)
class Application:
    """The proxy as an ASGI application, and the handle to its configuration."""

    asgi: FastAPI
    live: Live
    gate: Gate

    async def reconfigure(self, settings: Settings, parts: Parts) -> None:
        """Takes new settings while serving; parts that stay are the same objects as before.

        Raises what opening a new part raises, or `ValueError`; then nothing has changed. The listening address and
        what the process was started with (`device`, `dtype`) stay as they are.
        """
        await self.live.replace(build_gateway(settings, parts, self.live.gateway))
        self.gate.settings = settings.server


def create_app(
    settings: Settings, parts: Parts, registry: CollectorRegistry, version: str = "0", *, scores_only: bool = False
) -> Application:
    """The whole proxy, or of it the scoring service alone. Raises `ValueError` for settings that cannot work."""
    metrics = ProxyMetrics(registry, version)
    live = Live(build_gateway(settings, parts, None, metrics))
    gate = Gate(settings.server, metrics)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await live.open()
        try:
            yield
        finally:
            await live.gateway.joining.aclose()
            await live.aclose()

    app = _Framework(title="winnow", version=version, lifespan=lifespan, redoc_url=None, redirect_slashes=False)
    app.outside = Envelope(Dispatch(app.inside, scores_only=scores_only), live, gate)
    if parts.around is not None:
        app.outside = parts.around(app.outside)
    if settings.server.cors_origins:
        app.outside = with_cors(app.outside, settings.server.cors_origins)
    app.state.gate = gate
    app.add_exception_handler(Exception, _unexpected_error)
    app.add_exception_handler(HTTPException, _framework_error)
    app.add_exception_handler(RequestValidationError, _validation_error)
    app.include_router(operations(live, gate))
    describe(app)
    return Application(app, live, gate)


def build_gateway(
    settings: Settings, parts: Parts, before: Gateway | None, metrics: ProxyMetrics | None = None
) -> Gateway:
    """A gateway of these settings. What must outlive a change of them is taken over from `before`."""
    if before is not None:
        metrics = before.metrics
    assert metrics is not None, "the first gateway brings the metrics"
    guarded = {name: _guarded(name, upstream, settings, before, metrics) for name, upstream in parts.upstreams.items()}
    drawers = {name: _drawer(name, upstream, settings, before) for name, upstream in guarded.items()}

    def route(name: str, own: RouteSettings, upstream: str, model: str | None) -> Route:
        return Route(
            name=name,
            settings=own,
            upstream=guarded[upstream],
            drawer=drawers[upstream],
            scorer=None if own.reward_model == "none" else parts.scorers.get(own.reward_model or DEFAULT),
            model=model,
            forward_headers=settings.upstream_settings(upstream).forward_headers,
        )

    named = {name: settings.named_route(name) for name in settings.routes}
    keys = KeyRing(settings.server.api_keys, settings.keys, before.keys if before is not None else None)
    return Gateway(
        settings=settings,
        routing=RoutingTable(
            route(DEFAULT, settings.route, settings.default_upstream, None),
            {
                name: route(name, own, own.upstream or settings.default_upstream, own.model or name)
                for name, own in named.items()
            },
        ),
        upstreams=parts.upstreams,
        scorers=parts.scorers,
        admission=before.admission if before is not None else Admission(settings.server, metrics),
        metrics=metrics,
        keys=keys,
        page_guard=_page_guard(settings, keys),
        joining=before.joining if before is not None else Joining(settings.server.max_lingering),
        forward_headers=_forward_headers(settings),
        prices=_prices(settings),
        recorder=_recorder(settings, parts.store, before, metrics),
        histories=before.histories if before is not None else Histories(),
    )


def _guarded(
    name: str, upstream: Upstream, settings: Settings, before: Gateway | None, metrics: ProxyMetrics
) -> GuardedUpstream:
    """One a upstream, whose calls under way and circuit are kept while it stays the same."""
    for route in before.routing if before is not None else ():
        if route.upstream.guards(upstream):
            return route.upstream
    return GuardedUpstream(upstream, settings.upstream_settings(name), metrics)


def _drawer(name: str, upstream: GuardedUpstream, settings: Settings, before: Gateway | None) -> Drawer:
    """One a upstream, with what was learnt of it while it stays the same."""
    for route in before.routing if before is not None else ():
        if route.upstream is upstream:
            return route.drawer
    return Drawer(upstream, Capabilities(settings.upstream_settings(name).n_mode))


def _recorder(
    settings: Settings, store: FeedbackStore | None, before: Gateway | None, metrics: ProxyMetrics
) -> Recorder | None:
    """One a store, with what waits to be written. Raises `ValueError` for a redaction pattern that is none."""
    if store is None:
        return None
    if before is not None and before.recorder is not None and before.recorder.store is store:
        return before.recorder
    chosen = settings.feedback
    redactor = Redactor(enabled=chosen.redact, patterns=chosen.redact_patterns)
    limits = RecorderLimits(
        max_queue=chosen.max_queue,
        max_queue_bytes=chosen.max_queue_bytes,
        max_batch=chosen.max_batch,
        retry_s=chosen.retry_s,
        flush_s=chosen.flush_s,
        second_look_s=_SECOND_LOOK_S if settings.server.workers > 1 else 0.0,
    )
    return Recorder(store, redactor, limits, metrics)


def _forward_headers(settings: Settings) -> frozenset[str]:
    upstreams = map(settings.upstream_settings, settings.used_upstreams)
    return frozenset(name.lower() for upstream in upstreams for name in upstream.forward_headers)


def _prices(settings: Settings) -> dict[str, Price]:
    return {
        model: Price(price.prompt, price.completion, price.cached_prompt) for model, price in settings.prices.items()
    }


def _page_guard(settings: Settings, keys: KeyRing) -> PageGuard | None:
    """Where only the loopback address stands between a web page and an upstream's key."""
    spends = any(settings.upstream_settings(name).key is not None for name in settings.used_upstreams)
    return PageGuard(settings.server.cors_origins) if spends and not keys.guards else None


class _Framework(FastAPI):
    """FastAPI behind our own layers: its own would cost every request a tenth more, and few of them need it."""

    outside: ASGIApp
    """What requests come to."""

    async def inside(self, scope: Scope, receive: Receive, send: Send) -> None:
        await super().__call__(scope, receive, send)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.outside(scope, receive, send)


async def _unexpected_error(request: Request, error: Exception) -> Response:
    """The framework raises it again, after this, for the log."""
    return _rendered(InternalError("Something went wrong on this server"))


async def _framework_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    detail = f"{error.detail}: {request.method} {request.url.path}"
    return _rendered(error_for_status(error.status_code, detail), error.headers)


async def _validation_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    return _rendered(BadRequestError(str(problem["msg"]), param=".".join(str(part) for part in problem["loc"])))


def _rendered(error: ProxyError, headers: Mapping[str, str] | None = None) -> Response:
    return Response(error.body(), error.http_status, headers=headers, media_type=JSON)
