"""Spans of a request, its upstream calls and its scoring, over real HTTP into an exporter in memory."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import httpx2
import pytest
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode
from prometheus_client import CollectorRegistry

from proxy.app import Parts, create_app
from proxy.config_loading import load_settings
from proxy.config_operations import TracingSettings
from proxy.tracing import Tracing
from proxy.upstreams.hosted import HostedUpstream
from reward.errors import ScoringError
from tests.fakes.scorer import FakeScorer
from tests.fakes.serving import serving
from tests.fakes.upstream import FakeUpstream, Received, Reply, error_reply

MESSAGES = [{"role": "user", "content": "secret-prompt"}]
TRACE = "0af7651916cd43dd8448eb211c80319c"
PARENT = f"00-{TRACE}-b7ad6b7169203331-01"


@dataclass
class Traced:
    url: str
    upstream: FakeUpstream
    scorer: FakeScorer
    exporter: InMemorySpanExporter

    def ask(self, headers: dict[str, str] | None = None, **fields: Any) -> httpx2.Response:
        body = {"model": "m", "messages": MESSAGES, "seed": 1} | fields
        return httpx2.post(f"{self.url}/v1/chat/completions", json=body, headers=headers or {}, timeout=30)

    def spans(self, kind: SpanKind) -> list[ReadableSpan]:
        return [span for span in self.exporter.get_finished_spans() if span.kind == kind]

    @property
    def request(self) -> ReadableSpan:
        """Waits, by asking something else, until the answered request has ended in the server too."""
        httpx2.get(f"{self.url}/healthz")
        return next(span for span in self.spans(SpanKind.SERVER) if span.name != "GET")


Start = Callable[..., Traced]


@pytest.fixture
def start() -> Iterator[Start]:
    with contextlib.ExitStack() as running:

        def start(tracing: dict[str, Any] | None = None, **route: Any) -> Traced:
            upstream, scorer, exporter = FakeUpstream(), FakeScorer(), InMemorySpanExporter()
            url = running.enter_context(serving(upstream))
            traces = Tracing(TracingSettings(**(tracing or {})), "0", SimpleSpanProcessor(exporter))
            running.callback(traces.close)
            settings = load_settings(
                flags={"upstream": {"url": f"{url}/v1"}, "route": {"max_retries": 0, "best_of": 3} | route}
            )
            parts = Parts(
                {"upstream": traces.upstream(HostedUpstream(settings.upstream))},
                {"default": traces.scorer(scorer)},
                around=traces.application,
            )
            app = create_app(settings, parts, CollectorRegistry())
            return Traced(running.enter_context(serving(app.asgi)), upstream, scorer, exporter)

        yield start


def attributes(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


def test_a_request_its_calls_and_its_scoring(start: Start) -> None:
    traced = start(score_early=False)
    traced.upstream.script = lambda received: Reply(texts=("secret good", "secret bad", "secret"), honours_n=False)
    answer = traced.ask({"traceparent": PARENT, "tracestate": "a=b", "x-request-id": "r-1"})
    request = traced.request
    assert request.name == "POST /v1/chat/completions"
    found = attributes(request)
    assert found["http.response.status_code"] == 200 and found["http.route"] == "/v1/chat/completions"
    assert found["gen_ai.request.model"] == "m" and found["gen_ai.request.choice.count"] == 3
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (21, 5)
    assert found["winnow.completion_id"] == answer.headers["x-winnow-completion-id"]
    assert (found["winnow.request_id"], found["winnow.route"], found["winnow.reward"]) == ("r-1", "default", 1.0)
    calls = traced.spans(SpanKind.CLIENT)
    assert [span.name for span in calls] == ["chat m"] * 3
    assert attributes(calls[0])["gen_ai.operation.name"] == "chat"
    assert attributes(calls[0])["gen_ai.provider.name"] == "upstream"
    (scoring,) = traced.spans(SpanKind.INTERNAL)
    assert scoring.name == "score fake"
    values = [dict(event.attributes or {})["gen_ai.evaluation.score.value"] for event in scoring.events]
    assert sorted(values) == [-1.0, 0.0, 1.0]
    assert f"{request.context.trace_id:032x}" == TRACE and request.parent is not None
    assert all(one.parent is not None and one.parent.span_id == request.context.span_id for one in [*calls, scoring])
    seen = {received.headers["traceparent"] for received in traced.upstream.received}
    assert seen == {f"00-{TRACE}-{span.context.span_id:016x}-01" for span in calls}
    assert {received.headers["tracestate"] for received in traced.upstream.received} == {"a=b"}
    everything = "".join(span.to_json() for span in traced.exporter.get_finished_spans())
    assert "secret" not in everything


@pytest.mark.parametrize("stream", [False, True])
def test_what_is_passed_on(start: Start, stream: bool) -> None:
    traced = start(best_of=1)
    assert traced.ask(stream=stream).status_code == 200
    request = traced.request
    (call,) = traced.spans(SpanKind.CLIENT)
    assert call.name == "chat m" and call.parent is not None
    assert call.parent.span_id == request.context.span_id


def test_failures_are_marked_by_kind(start: Start) -> None:
    traced = start()

    def script(received: Received) -> Reply:
        return error_reply(500) if received.number == 0 else Reply(raw=b"cut", headers={"content-length": "99"})

    traced.upstream.script = script
    traced.scorer.failure = ScoringError("secret")
    assert traced.ask(best_of=2).status_code >= 500
    assert attributes(traced.request)["error.type"]
    assert traced.request.status.status_code is StatusCode.ERROR
    kinds = {attributes(span).get("error.type") for span in traced.spans(SpanKind.CLIENT)}
    assert "500" in kinds and len(kinds) == 2


def test_a_failed_scoring_is_marked(start: Start) -> None:
    traced = start(score_early=False)
    traced.scorer.failure = ScoringError("secret")
    assert traced.ask().status_code == 200
    (scoring,) = traced.spans(SpanKind.INTERNAL)
    assert attributes(scoring)["error.type"] == "ScoringError" and scoring.status.status_code is StatusCode.ERROR
    assert "secret" not in scoring.to_json()


def test_cancelled_calls_end_their_spans(start: Start) -> None:
    traced = start()
    traced.upstream.script = lambda received: Reply(hold=received.number == 0)
    assert traced.ask(best_of=2, winnow={"deadline_s": 1}).status_code == 200
    kinds = [attributes(span).get("error.type") for span in traced.spans(SpanKind.CLIENT)]
    assert sorted(map(str, kinds)) == ["None", "cancelled"]
    traced.upstream.release()


def test_the_sample_ratio_leaves_the_clients_choice(start: Start) -> None:
    traced = start({"sample_ratio": 0.0})
    traced.ask()
    assert not traced.exporter.get_finished_spans()
    traced.ask({"traceparent": PARENT})
    assert traced.request.context is not None


def test_no_path_of_a_client_becomes_a_name(start: Start) -> None:
    traced = start()
    httpx2.get(f"{traced.url}/v1/invented-path")
    httpx2.get(f"{traced.url}/invented-path")
    assert traced.request.name == "GET /v1/{path}"
    assert not any("invented" in span.name for span in traced.exporter.get_finished_spans())


def test_off_means_not_imported() -> None:
    script = "import sys, proxy.app, winnow.parts; print([name for name in sys.modules if 'opentelemetry.sdk' in name])"
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert result.stdout.strip() == "[]"
