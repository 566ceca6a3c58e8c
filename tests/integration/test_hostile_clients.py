"""Clients that want the server to call somebody else, to remember what they invent, or to work for nobody."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import psutil
import pytest
from prometheus_client import CollectorRegistry

from proxy.app import Parts, create_app
from proxy.config_loading import load_settings
from proxy.metrics import exposition
from tests.conftest import RunningProxy, StartProxy
from tests.fakes.memory import MemoryUpstream, exchange
from tests.fakes.scorer import FakeScorer
from tests.fakes.upstream import Reply

MESSAGES = [{"role": "user", "content": "x"}]


class Canary:
    """A socket that nobody has a reason to connect to."""

    def __init__(self) -> None:
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listening.getsockname()[1]}"

    def was_called(self) -> bool:
        self._listening.setblocking(False)
        try:
            self._listening.accept()[0].close()
        except BlockingIOError:
            return False
        return True

    def close(self) -> None:
        self._listening.close()


@pytest.fixture
def canary() -> Iterator[Canary]:
    made = Canary()
    yield made
    made.close()


def test_no_request_names_its_own_upstream(start_proxy: StartProxy, canary: Canary) -> None:
    proxy = start_proxy(upstream={"key": "secret"})
    url = f"http://{canary.address}/v1"
    schema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"$ref": url}}}
    metaschema = {"type": "json_schema", "json_schema": {"name": "s", "schema": {"$schema": url, "$id": url}}}
    tool = {"type": "function", "function": {"name": "f", "parameters": {"$ref": url, "$schema": url}}}
    bodies: list[dict[str, Any]] = [
        {"api_base": url}, {"base_url": url}, {"model": url}, {"model": f"{url}@2"}, {"upstream": url}, {"url": url},
        {"extra_body": {"api_base": url}}, {"litellm_params": {"api_base": url, "base_url": url}}, {"proxy": url},
        {"metadata": {"base_url": url}}, {"response_format": schema}, {"response_format": metaschema},
        {"tools": [tool]}, {"winnow": {"reward_model": url}}, {"winnow": {"upstream": url}}, {"winnow": {"url": url}},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]},
    ]  # fmt: skip
    headers = [
        {"host": canary.address}, {"x-forwarded-host": canary.address}, {"x-portkey-custom-host": url},
        {"x-base-url": url}, {"forwarded": f"host={canary.address}"}, {"x-winnow-route": url}, {"x-original-url": url},
        {"x-http-method-override": "CONNECT"}, {"referer": url}, {"http-proxy": url},
    ]  # fmt: skip
    answered = 0
    with httpx2.Client(base_url=proxy.url, timeout=30) as client:
        for path in ("/v1/chat/completions", "/v1/responses", "/v1/completions"):
            common = {"model": "m", "messages": MESSAGES, "input": "x", "prompt": "x"}
            answers = [client.post(path, json=common | body) for body in bodies]
            answers += [client.post(path, json=common, headers=one) for one in headers]
            answered += sum(answer.status_code == 200 for answer in answers)
            assert all(answer.status_code in (200, 400, 403, 404) for answer in answers)
    assert answered > 30
    received = [*proxy.upstream.received, *proxy.upstream.others]
    assert len({one.headers["host"] for one in received}) == 1
    assert not canary.was_called()


@pytest.mark.parametrize(
    "target",
    [
        "http://{canary}/v1/models", "//{canary}/v1/models", "/v1/@{canary}/models", "/v1//{canary}/models",
        "/v1/http://{canary}/", "/v1/\\\\{canary}\\x", "/v1/%0d%0ahost:%20{canary}", "/v1/..%5c..%5c{canary}",
        "/v1/%2e%2e/%2e%2e/{canary}", "/v1/models?@{canary}", "/v1/models#@{canary}", "/v1/models%23@{canary}/",
        "/v1/models;@{canary}", "/v1/%00{canary}", "/v1:80@{canary}/", "/v1@{canary}/models",
    ],
)  # fmt: skip
def test_no_path_leads_elsewhere(start_proxy: StartProxy, canary: Canary, target: str) -> None:
    proxy = start_proxy(upstream={"key": "secret"})
    host, port = proxy.url.removeprefix("http://").split(":")
    head = f"GET {target.format(canary=canary.address)} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n"
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode())
        status = int(connection.recv(65_536).split()[1])
    assert status in (200, 400, 404)
    for seen in proxy.upstream.others:
        assert seen.path.startswith("/v1/") and seen.headers["host"] != canary.address
        assert "\r" not in seen.path and canary.address not in seen.headers.values()
    assert not canary.was_called()


def test_redirects_of_the_upstream_are_not_followed(proxy: RunningProxy, canary: Canary) -> None:
    url = f"http://{canary.address}/v1"
    proxy.upstream.script = lambda received: Reply(status=307, raw=b"", headers={"location": url})
    for best_of in (1, 2):
        body = {"model": "m", "messages": MESSAGES, "best_of": best_of}
        httpx2.post(f"{proxy.url}/v1/chat/completions", json=body, follow_redirects=False)
    assert proxy.upstream.received
    assert not canary.was_called()


def test_invented_names_leave_nothing_behind() -> None:
    """Models, users, paths, headers: no new series, and no memory that grows with them."""
    process = psutil.Process()
    settings = load_settings(flags={"upstream": {"url": "http://unused.invalid/v1"}, "route": {"best_of": 2}})
    registry = CollectorRegistry()
    app = create_app(settings, Parts({"upstream": MemoryUpstream()}, {"default": FakeScorer()}), registry).asgi

    async def invent(numbers: range) -> int:
        for number in numbers:
            body = {
                "model": f"invented-{number}",
                "user": f"u{number}",
                "messages": MESSAGES,
                "best_of": 1 + number % 2,
            }
            names = {
                "x-request-id": f"id-{number}",
                "openai-organization": f"o{number}",
                "x-winnow-route": f"r{number}",
            }
            status, _, _ = await exchange(app, "/v1/chat/completions", json.dumps(body).encode(), names)
            assert status in (200, 404)
            del names["x-winnow-route"]
            status, _, _ = await exchange(app, "/v1/chat/completions", json.dumps(body).encode(), names)
            assert status == 200
            assert (await exchange(app, f"/nowhere/{number}", b"", method="GET"))[0] == 404
        return len(exposition(registry).splitlines())

    async def invent_all() -> None:
        async with app.router.lifespan_context(app):
            series = await invent(range(1000))
            before = process.memory_info().rss
            assert await invent(range(1000, 10_000)) == series
            assert process.memory_info().rss - before < 16 * 1024 * 1024

    asyncio.run(invent_all())
    text = exposition(registry)
    assert b"invented" not in text and len(text) < 200_000


class TestLeaving:
    """Everything done for a client ends within a tenth of a second of its leaving."""

    @pytest.mark.parametrize(
        ("body", "calls"),
        [({}, 1), ({"seed": 1}, 4), ({"stream": True}, 4), ({"best_of": 1}, 1), ({"best_of": 1, "stream": True}, 1)],
    )
    def test_upstream_calls_end(self, proxy: RunningProxy, body: dict[str, Any], calls: int) -> None:
        proxy.upstream.script = lambda received: Reply(hold=True)
        elapsed = []
        # The best of three: the machine may be busy with something else, the code may not.
        for attempt in range(1, 4):
            connection = opened(proxy, body)
            proxy.upstream.wait_for(lambda upstream, n=attempt: len(upstream.received) == n * calls)
            left = time.monotonic()
            connection.close()
            proxy.upstream.wait_for(lambda upstream, n=attempt: upstream.cancelled == n * calls)
            elapsed.append(time.monotonic() - left)
        assert min(elapsed) < 0.1
        assert proxy.upstream.finished == 0 and not proxy.scorer.scored

    @pytest.mark.parametrize("body", [{}, {"stream": True}])
    def test_scoring_ends(self, proxy: RunningProxy, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
        scoring, ended = threading.Event(), threading.Event()

        async def score(prompt: object, completions: object) -> list[Any]:
            scoring.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
            return []

        monkeypatch.setattr(proxy.scorer, "score", score)
        elapsed = []
        for _ in range(3):
            scoring.clear()
            ended.clear()
            connection = opened(proxy, body)
            assert scoring.wait(20)
            left = time.monotonic()
            connection.close()
            assert ended.wait(20)
            elapsed.append(time.monotonic() - left)
        assert min(elapsed) < 0.1


def test_what_bodies_hold_together_is_bounded(start_proxy: StartProxy) -> None:
    proxy = start_proxy(server={"max_buffered_body_bytes": 4096, "max_body_bytes": 8192}, route={"best_of": 1})
    proxy.upstream.script = lambda received: Reply(hold=received.number == 0)
    raw = json.dumps({"model": "m", "messages": MESSAGES, "pad": "x" * 3000}).encode()
    url = f"{proxy.url}/v1/chat/completions"

    def in_pieces() -> Iterator[bytes]:
        yield raw[:2000]
        yield raw[2000:]

    with opened(proxy, {"pad": "x" * 3000}), httpx2.Client(timeout=20) as client:
        proxy.upstream.wait_for(lambda upstream: len(upstream.received) == 1)
        for body in (raw, in_pieces()):
            answer = client.post(url, content=body)
            assert answer.status_code == 429
            assert answer.json()["error"]["code"] == "max_buffered_body_bytes"
            assert answer.headers["retry-after"] == "1"
        assert client.post(url, json={"model": "m", "messages": MESSAGES}).status_code == 200, "small ones go on"
        assert client.get(f"{proxy.url}/healthz").status_code == 200
    proxy.upstream.wait_for(lambda upstream: upstream.cancelled == 1)
    assert httpx2.post(url, content=in_pieces(), timeout=20).status_code == 200


def opened(proxy: RunningProxy, body: dict[str, Any]) -> socket.socket:
    """A bare connection with a request on it; closing it is leaving."""
    host, port = proxy.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    raw = json.dumps({"model": "m", "messages": MESSAGES} | body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection
