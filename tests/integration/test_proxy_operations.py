"""What passes through, who may come in, and what the operator sees."""

from __future__ import annotations

import hashlib
import json
import socket
import urllib.request
from typing import Any

import httpx2
import openai
import orjson
import pytest
from prometheus_client.parser import text_string_to_metric_families

from reward.errors import InputError, QueueFullError, ScoringError
from tests.conftest import RunningProxy, StartProxy
from tests.fakes.serving import serving
from tests.fakes.upstream import FakeUpstream, Reply, error_reply

MESSAGES = [{"role": "user", "content": "Say something."}]


class TestPassThrough:
    @pytest.mark.parametrize("stream", [False, True])
    def test_best_of_1_is_byte_equal_both_ways(self, start_proxy: StartProxy, stream: bool) -> None:
        proxy = start_proxy(route={"best_of": 1})
        # Spacing, order and escapes that no re-encoding would keep.
        body = b'{ "stream":%s,"model" : "m", "x":1.50, "messages":[{"role":"user","content":"\\u00e9 \xc3\xa9"}] }' % (
            b"true" if stream else b"false"
        )
        answer = httpx2.post(f"{proxy.url}/v1/chat/completions", content=body)
        assert proxy.upstream.received[0].raw == body
        direct = httpx2.post(f"{upstream_url(proxy)}/chat/completions", content=body)
        assert answer.content.replace(b"chatcmpl-0", b"chatcmpl-1") == direct.content
        assert answer.headers["content-type"] == direct.headers["content-type"]
        assert answer.headers["x-winnow-best-of"] == "1"

    def test_any_path_and_method(self, proxy: RunningProxy) -> None:
        answer = httpx2.patch(
            f"{proxy.url}/v1/files/a%2Fb/x?q=%20z&r", content=b"\x00\xff raw", headers={"cookie": "c"}
        )
        assert answer.content == b"\x00\xff raw"
        assert answer.headers["content-type"] == "application/octet-stream"
        assert answer.headers["openai-version"] == "fake"
        assert "set-cookie" not in answer.headers
        seen = proxy.upstream.others[0]
        assert (seen.method, seen.path, seen.query) == ("PATCH", "/v1/files/a%2Fb/x", "q=%20z&r")
        assert "cookie" not in seen.headers

    def test_uploads_are_streamed(self, proxy: RunningProxy) -> None:
        pieces = [bytes([number]) * 65_536 for number in range(40)]
        answer = httpx2.post(f"{proxy.url}/v1/files", content=iter(pieces))
        assert answer.content == b"".join(pieces)
        file = proxy.client.files.with_raw_response.create(file=b"x" * 300_000, purpose="batch")
        assert b"x" * 300_000 in file.content

    @pytest.mark.parametrize(("content", "calls"), [(b"", 3), (b"body", 1)])
    def test_only_what_has_no_body_is_tried_again(self, start_proxy: StartProxy, content: bytes, calls: int) -> None:
        """A body that was streamed through is gone: a second attempt would come without it."""
        fake, bodies = FakeUpstream(), list[bytes]()

        async def busy(scope: Any, receive: Any, send: Any) -> None:
            if scope["type"] == "lifespan":
                await fake(scope, receive, send)
                return
            bodies.append((await receive()).get("body", b""))
            await send({"type": "http.response.start", "status": 503, "headers": [(b"content-length", b"0")]})
            await send({"type": "http.response.body"})

        with serving(busy) as url:
            upstream = {"url": f"{url}/v1", "retry_backoff_s": 0.001}
            proxy = start_proxy(upstream=upstream, route={"max_retries": 2})
            assert httpx2.request("GET", f"{proxy.url}/v1/things", content=content).status_code == 503
        assert bodies == [content] * calls

    def test_headers_are_forwarded_by_allow_list(self, proxy: RunningProxy) -> None:
        headers = {
            "openai-organization": "o",
            "x-forwarded-for": "1.2.3.4",
            "x-secret": "s",
            "traceparent": "00-a-b-01",
        }
        proxy.client.chat.completions.create(model="m", messages=MESSAGES, extra_headers=headers)
        seen = proxy.upstream.received[0].headers
        assert seen["openai-organization"] == "o" and seen["traceparent"] == "00-a-b-01"
        assert not {"x-forwarded-for", "x-secret", "x-stainless-lang"} & set(seen)
        assert seen["accept-encoding"] == "identity"
        assert seen["authorization"] == "Bearer client-key"

    def test_headers_in_any_language_go_through(self, start_proxy: StartProxy) -> None:
        """The bytes that came go out, as UTF-8 or, the old way, as Latin-1."""
        proxy = start_proxy(upstream={"forward_headers": ["x-title"]}, route={"best_of": 1})
        utf8, latin1 = "attachment; filename=Ü文.txt".encode(), "Zürich".encode("latin-1")
        given = {"content-disposition": utf8.decode(), "openai-region": latin1.decode("utf-8", "surrogateescape")}
        proxy.upstream.script = lambda received: Reply(headers=given)
        answer = httpx2.post(
            f"{proxy.url}/v1/chat/completions",
            json={"model": "m", "messages": MESSAGES},
            headers={"x-title": "Übersetzer 文".encode()},
        )
        assert proxy.upstream.received[0].headers["x-title"] == "Übersetzer 文"
        sent = dict(answer.headers.raw)
        assert {sent[b"content-disposition"], sent[b"openai-region"]} == {utf8, latin1}

    @pytest.mark.parametrize("path", ["/v1/%2e%2e/admin", "/v1/x/../../admin", "/v1/a%2F..%2F../admin"])
    def test_no_path_leads_out_of_the_base_url(self, proxy: RunningProxy, path: str) -> None:
        status = raw_status(proxy, f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n")
        assert status == 404
        assert not proxy.upstream.others

    def test_legacy_chat_paths_with_other_methods(self, proxy: RunningProxy) -> None:
        assert httpx2.get(f"{proxy.url}/v1/chat/completions/abc").status_code == 200
        assert proxy.upstream.others[0].path == "/v1/chat/completions/abc"


def raw_status(proxy: RunningProxy, request: str) -> int:
    """For requests that no client library would send as they are."""
    host, port = proxy.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(request.encode())
        return int(connection.recv(64).split()[1])


def upstream_url(proxy: RunningProxy) -> str:
    return f"http://{proxy.upstream.received[0].headers['host']}/v1"


class TestKeys:
    def test_a_known_key_opens_and_stays_here(self, start_proxy: StartProxy) -> None:
        hashed = "sha256:" + hashlib.sha256(b"client-key").hexdigest()
        proxy = start_proxy(server={"api_keys": ["other", hashed]}, upstream={"key": "upstream-secret"})
        proxy.client.chat.completions.create(model="m", messages=MESSAGES)
        proxy.client.models.list()
        for seen in (proxy.upstream.received[0], proxy.upstream.others[0]):
            assert seen.headers["authorization"] == "Bearer upstream-secret"

    def test_a_key_in_any_language_opens(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(server={"api_keys": ["schlüssel-文"]})
        headers = {"authorization": "Bearer schlüssel-文".encode()}
        assert httpx2.get(f"{proxy.url}/v1/models", headers=headers).status_code == 200

    def test_without_an_upstream_key_it_does_not_travel_on(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(server={"api_keys": ["client-key"]})
        proxy.client.chat.completions.create(model="m", messages=MESSAGES)
        assert "authorization" not in proxy.upstream.received[0].headers

    @pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"authorization": "Basic x"}])
    def test_others_stay_out(self, start_proxy: StartProxy, headers: dict[str, str]) -> None:
        proxy = start_proxy(server={"api_keys": ["client-key"]})
        for path in ("chat/completions", "models", "score"):
            answer = httpx2.post(f"{proxy.url}/v1/{path}", json={"model": "m", "messages": MESSAGES}, headers=headers)
            assert answer.status_code == 401
            assert answer.json()["error"]["code"] == "invalid_api_key"
            assert "wrong" not in answer.text
            assert answer.headers["x-request-id"]
        assert not proxy.upstream.received and not proxy.upstream.others
        assert httpx2.get(f"{proxy.url}/healthz").status_code == 200


class TestScore:
    def score(self, proxy: RunningProxy, **body: Any) -> httpx2.Response:
        return httpx2.post(f"{proxy.url}/v1/score", json=body)

    def test_texts_and_messages(self, proxy: RunningProxy) -> None:
        message = {"role": "assistant", "content": "bad bad"}
        answer = self.score(proxy, prompt="p", completions=["good", message, [message]]).json()
        assert answer["reward_model"] == "fake"
        assert [(one["index"], one["reward"]) for one in answer["scores"]] == [(0, 1.0), (1, -2.0), (2, -2.0)]
        assert answer["scores"][0]["percentile"] == 60 and answer["scores"][0]["truncated"] is False
        assert answer["usage"] == {"prompt_tokens": 3, "completion_tokens": 5}

    @pytest.mark.parametrize(
        ("body", "param"),
        [
            ({"prompt": "p", "completions": []}, "completions"),
            ({"prompt": "p"}, "completions"),
            ({"prompt": 5, "completions": ["x"]}, "prompt"),
            ({"prompt": "p", "completions": ["x", 3]}, "completions.1"),
            ({"prompt": "", "completions": ["x"]}, "prompt"),
            ({"prompt": [{"role": "alien", "content": "x"}], "completions": ["x"]}, "prompt[0].role"),
            ({"prompt": "p", "completions": ["x"], "reward_model": "nope"}, "reward_model"),
            ({"prompt": "p", "completions": ["x"], "reward_modl": "fake"}, "reward_modl"),
        ],
    )
    def test_bad_requests(self, proxy: RunningProxy, body: dict[str, Any], param: str) -> None:
        answer = self.score(proxy, **body)
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == param

    @pytest.mark.parametrize(
        ("failure", "status"), [(InputError("no"), 400), (QueueFullError("full", 2), 429), (ScoringError("no"), 503)]
    )
    def test_failures(self, proxy: RunningProxy, failure: Exception, status: int) -> None:
        proxy.scorer.failure = failure
        answer = self.score(proxy, prompt="p", completions=["x"])
        assert answer.status_code == status
        if status == 429:
            assert answer.headers["retry-after"] == "2"


class TestOperations:
    def test_health_and_readiness(self, proxy: RunningProxy) -> None:
        assert httpx2.get(f"{proxy.url}/healthz").json() == {"status": "ok"}
        ready = httpx2.get(f"{proxy.url}/readyz")
        assert ready.status_code == 200 and ready.json()["reward_models"] == {"fake": True}
        proxy.scorer.ready = False
        assert httpx2.get(f"{proxy.url}/readyz").status_code == 503

    def test_not_ready_without_the_upstream(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(upstream={"url": "http://127.0.0.1:9/v1"})
        answer = httpx2.get(f"{proxy.url}/readyz")
        assert answer.status_code == 503 and answer.json()["upstream"] is False

    def test_documentation_knows_every_path(self, proxy: RunningProxy) -> None:
        schema = httpx2.get(f"{proxy.url}/openapi.json").json()
        wanted = {"/v1/chat/completions", "/v1/completions", "/v1/score", "/healthz", "/readyz", "/metrics"}
        assert wanted <= set(schema["paths"])
        assert "min_reward" in schema["components"]["schemas"]["WinnowField"]["properties"]
        assert httpx2.get(f"{proxy.url}/docs").status_code == 200

    def test_request_ids(self, proxy: RunningProxy) -> None:
        given = httpx2.get(f"{proxy.url}/healthz", headers={"x-request-id": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        made = httpx2.get(f"{proxy.url}/healthz", headers={"x-request-id": "not ok; x"})
        assert made.headers["x-request-id"].startswith("req_")

    def test_metrics_move(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: Reply(texts=("bad", "good good", "", "good"))
        proxy.client.chat.completions.create(model="m", messages=MESSAGES)
        proxy.upstream.script = lambda received: error_reply(500)
        with pytest.raises(openai.InternalServerError):
            proxy.client.chat.completions.create(model="m", messages=MESSAGES)
        with urllib.request.urlopen(f"{proxy.url}/metrics") as response:
            text = response.read().decode()
        families = {family.name: family for family in text_string_to_metric_families(text)}
        assert {
            "winnow_requests", "winnow_request_duration_seconds", "winnow_overhead_seconds", "winnow_upstream_requests",
            "winnow_upstream_duration_seconds", "winnow_candidates", "winnow_reward", "winnow_reward_gain",
            "winnow_rejections", "winnow_tokens", "winnow_in_flight", "winnow_build_info",
        } <= set(families)  # fmt: skip
        route = {"route": "default"}
        assert proxy.metric("winnow_requests_total", **route, endpoint="chat", status="200") == 1
        assert proxy.metric("winnow_requests_total", **route, endpoint="chat", status="500") == 1
        assert proxy.metric("winnow_candidates_total", **route, outcome="scored") == 3
        assert proxy.metric("winnow_candidates_total", **route, outcome="invalid") == 1
        assert proxy.metric("winnow_tokens_total", **route, kind="prompt") == 7
        assert proxy.metric("winnow_tokens_total", **route, kind="completion") == 4
        # No sum: a histogram with negative buckets has none.
        assert proxy.metric("winnow_reward_bucket", **route, le="2.0") == 1
        assert proxy.metric("winnow_reward_bucket", **route, le="1.5") == 0
        assert proxy.metric("winnow_reward_gain_sum", **route) == pytest.approx(2 - 2 / 3)
        assert proxy.metric("winnow_upstream_requests_total", upstream="upstream", status="200") == 1
        assert proxy.metric("winnow_in_flight") == 0

    def test_labels_never_come_from_clients(self, proxy: RunningProxy) -> None:
        httpx2.get(f"{proxy.url}/v1/secret-path-1")
        httpx2.get(f"{proxy.url}/secret-path-2")
        proxy.client.chat.completions.create(model="secret-model", messages=MESSAGES)
        assert "secret" not in httpx2.get(f"{proxy.url}/metrics").text


def test_answers_are_json_that_strict_parsers_take(proxy: RunningProxy) -> None:
    body = {"model": "m", "messages": MESSAGES, "winnow": {"return_candidates": True}}
    answer = httpx2.post(f"{proxy.url}/v1/chat/completions", json=body)
    assert orjson.loads(answer.content) == json.loads(answer.content)
    assert int(answer.headers["content-length"]) == len(answer.content)
