"""OpenTelemetry traces: a span a request, an upstream call and a scoring, named by the GenAI semantic conventions.

Wrapped around the application, the upstreams and the scorers where tracing is on; where it is off, nothing here is
imported. Never a prompt, a completion, a key or a header. The conventions are still in development: their names stand
in this file alone.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Coroutine, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import replace
from typing import Any

from opentelemetry import context
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanProcessor, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.sampling import ParentBased, TraceIdRatioBased
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feedback.records import Messages
from proxy.config_operations import TracingSettings
from proxy.exchange import Exchange, exchange_of
from proxy.facts import Facts
from proxy.headers import request_headers
from proxy.upstreams.base import Upstream, UpstreamCall, UpstreamError, UpstreamResponse
from reward.scorer import Expects, Score, Scorer, TemplatedText

_TRACE_HEADERS = frozenset({"traceparent", "tracestate"})
_PROPAGATOR = TraceContextTextMapPropagator()
_OPERATIONS = {"/chat/completions": "chat", "/completions": "text_completion", "/responses": "chat"}
_ROUTES = {
    "chat": "/v1/chat/completions",
    "completions": "/v1/completions",
    "responses": "/v1/responses",
    "score": "/v1/score",
    "feedback": "/v1/feedback",
    "models": "/v1/models",
    "embeddings": "/v1/embeddings",
    "passthrough": "/v1/{path}",
}
"""By endpoint: a path of the client's own must not become a span's name."""


class Tracing:
    """Opened by whoever starts the server, and closed after it: what waits is then sent."""

    def __init__(self, settings: TracingSettings, version: str, processor: SpanProcessor | None = None) -> None:
        """`processor` in place of sending to `settings.endpoint`."""
        self._provider = TracerProvider(
            resource=Resource.create({"service.name": settings.service_name, "service.version": version}),
            sampler=ParentBased(TraceIdRatioBased(settings.sample_ratio)),
            shutdown_on_exit=False,
        )
        self._provider.add_span_processor(processor or BatchSpanProcessor(OTLPSpanExporter(settings.endpoint)))
        self._tracer = self._provider.get_tracer("winnow", version)

    def application(self, app: ASGIApp) -> ASGIApp:
        return _TracedApplication(app, self._tracer)

    def upstream(self, upstream: Upstream) -> Upstream:
        return _TracedUpstream(upstream, self._tracer)

    def scorer(self, scorer: Scorer) -> Scorer:
        return _TracedScorer(scorer, self._tracer)

    def close(self) -> None:
        """Blocks while the last spans are sent."""
        self._provider.shutdown()


class _TracedApplication:
    def __init__(self, app: ASGIApp, tracer: Tracer) -> None:
        self._app = app
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status: int | None = None

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        parent = _PROPAGATOR.extract(request_headers(scope), context=Context())
        span = self._tracer.start_span(scope["method"], context=parent, kind=SpanKind.SERVER)
        token = context.attach(set_span_in_context(span, parent))
        try:
            await self._app(scope, receive, watched)
        finally:
            context.detach(token)
            _describe_request(span, scope["method"], exchange_of(scope), status)
            span.end()


def _describe_request(span: Span, method: str, exchange: Exchange, status: int | None) -> None:
    facts = exchange.facts
    route = _ROUTES.get(facts.endpoint)
    if route is not None:
        span.update_name(f"{method} {route}")
    attributes = _request_attributes(facts) | {
        "http.request.method": method,
        "http.route": route,
        "http.response.status_code": status,
        "error.type": facts.error,
    }
    _set(span, attributes)
    if status is None:
        span.set_attribute("error.type", "client_left")
    if status is not None and status >= 500:
        span.set_status(StatusCode.ERROR, facts.error)


def _request_attributes(facts: Facts) -> dict[str, Any]:
    bill = facts.bill
    return {
        "gen_ai.request.model": facts.model,
        "gen_ai.request.choice.count": facts.best_of,
        "gen_ai.usage.input_tokens": bill.tokens.prompt if bill is not None else None,
        "gen_ai.usage.output_tokens": bill.tokens.completion if bill is not None else None,
        "winnow.request_id": facts.request_id,
        "winnow.route": facts.route,
        "winnow.key": facts.key,
        "winnow.candidates": facts.candidates,
        "winnow.upstream_calls": facts.num_calls,
        "winnow.reward": facts.reward,
        "winnow.accepted": facts.accepted,
        "winnow.cost": bill.cost if bill is not None else None,
        "winnow.completion_id": facts.completion_id,
    }


class _TracedUpstream:
    """A span from the sending of a call to the end of its answer; the upstream gets it as its parent."""

    def __init__(self, upstream: Upstream, tracer: Tracer) -> None:
        self._upstream = upstream
        self._tracer = tracer

    @property
    def name(self) -> str:
        return self._upstream.name

    async def open(self) -> None:
        await self._upstream.open()

    async def ready(self) -> bool:
        return await self._upstream.ready()

    async def aclose(self) -> None:
        await self._upstream.aclose()

    async def send(self, call: UpstreamCall) -> UpstreamResponse:
        operation = _OPERATIONS.get(call.path)
        name = f"{operation} {call.model}" if operation and call.model else operation or call.method
        span = self._tracer.start_span(name, kind=SpanKind.CLIENT)
        _set(span, {
            "gen_ai.operation.name": operation,
            "gen_ai.provider.name": self.name if operation else None,
            "gen_ai.request.model": call.model,
            "http.request.method": call.method,
        })  # fmt: skip
        try:
            response = await self._upstream.send(_with_trace(call, span))
        except BaseException as error:
            _fail(span, error)
            span.end()
            raise
        span.set_attribute("http.response.status_code", response.status)
        if response.status >= 400:
            span.set_attribute("error.type", str(response.status))
            span.set_status(StatusCode.ERROR)
        return _TracedResponse(response, span)


class _TracedResponse:
    def __init__(self, response: UpstreamResponse, span: Span) -> None:
        self._response = response
        self._span = span

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        return self._response.headers

    async def read(self) -> bytes:
        try:
            return await self._response.read()
        except BaseException as error:
            _fail(self._span, error)
            raise

    async def stream(self) -> AsyncIterator[bytes]:
        try:
            async for piece in self._response.stream():
                yield piece
        except GeneratorExit:
            raise  # whoever read had enough
        except BaseException as error:
            _fail(self._span, error)
            raise

    async def aclose(self) -> None:
        try:
            await self._response.aclose()
        finally:
            self._span.end()


class _TracedScorer:
    def __init__(self, scorer: Scorer, tracer: Tracer) -> None:
        self._scorer = scorer
        self._tracer = tracer

    @property
    def name(self) -> str:
        return self._scorer.name

    @property
    def ready(self) -> bool:
        return self._scorer.ready

    async def start(self) -> None:
        await self._scorer.start()

    def reward_at_percentile(self, percentile: float) -> float | None:
        return self._scorer.reward_at_percentile(percentile)

    async def aclose(self) -> None:
        await self._scorer.aclose()

    async def score(self, prompt: Messages, completions: Sequence[Messages]) -> list[Score]:
        return await self._spanned(len(completions), self._scorer.score(prompt, completions))

    def expecting(self, prompt: Messages) -> AbstractAsyncContextManager[None]:
        return self._scorer.expecting(prompt) if isinstance(self._scorer, Expects) else nullcontext()

    async def score_texts(self, texts: Sequence[TemplatedText]) -> list[Score]:
        return await self._spanned(len(texts), self._scorer.score_texts(texts))

    async def _spanned(self, count: int, scoring: Coroutine[Any, Any, list[Score]]) -> list[Score]:
        span = self._tracer.start_span(f"score {self.name}", kind=SpanKind.INTERNAL)
        span.set_attribute("winnow.completions", count)
        try:
            scores = await scoring
            for score in scores:
                evaluation: dict[str, Any] = {
                    "gen_ai.evaluation.name": self.name,
                    "gen_ai.evaluation.score.value": score.reward,
                }
                span.add_event("gen_ai.evaluation.result", evaluation)
            return scores
        except BaseException as error:
            _fail(span, error)
            raise
        finally:
            span.end()


def _with_trace(call: UpstreamCall, span: Span) -> UpstreamCall:
    """The client's own trace headers, which named this request's parent, make way for this call's."""
    carrier = {name: value for name, value in call.headers.items() if name.lower() not in _TRACE_HEADERS}
    _PROPAGATOR.inject(carrier, context=set_span_in_context(span))
    return replace(call, headers=carrier)


def _fail(span: Span, error: BaseException) -> None:
    """By kind, without the message, which may quote an upstream."""
    if isinstance(error, asyncio.CancelledError):
        span.set_attribute("error.type", "cancelled")
        return
    reason = error.reason if isinstance(error, UpstreamError) else type(error).__name__
    span.set_attribute("error.type", reason)
    span.set_status(StatusCode.ERROR)


def _set(span: Span, attributes: Mapping[str, Any]) -> None:
    span.set_attributes({name: value for name, value in attributes.items() if value is not None})
