"""A client that asks again for what is already being made."""

from __future__ import annotations

import json
import threading
import urllib.request
from typing import Any

import openai
import pytest

from tests.conftest import RunningProxy, StartProxy
from tests.fakes.upstream import FakeUpstream, Reply

BODY: dict[str, Any] = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "seed": 1}
WAYS = pytest.mark.parametrize(("best_of", "calls"), [(1, 1), (4, 4)])


class Asking(threading.Thread):
    """One request with the official client's own header, on a connection of its own."""

    def __init__(
        self, proxy: RunningProxy, best_of: int, retry_count: int, key: str = "k", tenant: str = "t", **body: Any
    ) -> None:
        super().__init__(daemon=True)
        raw = json.dumps(BODY | {"best_of": best_of} | body).encode()
        headers = {
            "content-type": "application/json",
            "authorization": f"Bearer {key}",
            "x-stainless-retry-count": str(retry_count),
            "x-tenant": tenant,
        }
        self._request = urllib.request.Request(f"{proxy.url}/v1/chat/completions", raw, headers)
        self.body: dict[str, Any] = {}
        self.headers: dict[str, str] = {}
        self.start()

    def run(self) -> None:
        with urllib.request.urlopen(self._request, timeout=20) as response:
            self.headers = {name.lower(): value for name, value in response.headers.items()}
            self.body = json.loads(response.read())

    def answer(self) -> dict[str, Any]:
        self.join(20)
        assert self.body
        return self.body


def received(count: int) -> Any:
    def claim(upstream: FakeUpstream) -> bool:
        return len(upstream.received) == count

    return claim


def joined(proxy: RunningProxy, count: int) -> None:
    """Waits until so many requests have joined another."""
    done = threading.Event()
    for _ in range(2000):
        if proxy.metric("winnow_requests_joined_total", route="default") == count:
            return
        done.wait(0.01)
    raise AssertionError("nobody joined")


@WAYS
def test_a_retry_joins(proxy: RunningProxy, best_of: int, calls: int) -> None:
    proxy.upstream.script = lambda received: Reply(hold=True)
    first = Asking(proxy, best_of, 0)
    proxy.upstream.wait_for(received(calls))
    second = Asking(proxy, best_of, 1)
    joined(proxy, 1)
    proxy.upstream.release()
    assert first.answer() == second.answer()
    assert second.headers["x-winnow-joined"] == "true"
    assert "x-winnow-joined" not in first.headers
    assert second.headers["x-request-id"] != first.headers["x-request-id"]
    assert len(proxy.upstream.received) == calls


def test_no_one_else_does(proxy: RunningProxy) -> None:
    proxy.upstream.script = lambda received: Reply(hold=True)
    asking = [
        Asking(proxy, 1, 0),
        Asking(proxy, 1, 0),
        Asking(proxy, 1, 1, key="another"),
        Asking(proxy, 1, 1, temperature=0.5),
    ]
    proxy.upstream.wait_for(received(4))
    proxy.upstream.release()
    for one in asking:
        one.answer()
        assert "x-winnow-joined" not in one.headers


def test_no_one_whom_the_upstream_knows_by_another_header_does(start_proxy: StartProxy) -> None:
    proxy = start_proxy(upstream={"forward_headers": ["X-Tenant"]})
    proxy.upstream.script = lambda received: Reply(texts=(received.headers["x-tenant"],), hold=True)
    first = Asking(proxy, 1, 0, tenant="a")
    proxy.upstream.wait_for(received(1))
    second = Asking(proxy, 1, 1, tenant="b")
    proxy.upstream.wait_for(received(2))
    proxy.upstream.release()
    assert [one.answer()["choices"][0]["message"]["content"] for one in (first, second)] == ["a", "b"]


@WAYS
def test_work_outlives_a_client_that_timed_out(start_proxy: StartProxy, best_of: int, calls: int) -> None:
    proxy = start_proxy(server={"linger_s": 60})
    proxy.upstream.script = lambda received: Reply(hold=True)
    leave(proxy, best_of, calls)
    second = Asking(proxy, best_of, 1)
    joined(proxy, 1)
    assert proxy.upstream.cancelled == 0
    proxy.upstream.release()
    assert second.answer()["choices"]
    assert len(proxy.upstream.received) == calls


@WAYS
def test_by_default_it_does_not(proxy: RunningProxy, best_of: int, calls: int) -> None:
    proxy.upstream.script = lambda received: Reply(hold=True)
    leave(proxy, best_of, calls)
    proxy.upstream.wait_for(lambda upstream: upstream.cancelled == calls)


@pytest.mark.parametrize("strategy", ["best_of_n", "adaptive"])
@WAYS
def test_an_official_client_that_times_out_pays_once(
    start_proxy: StartProxy, best_of: int, calls: int, strategy: str
) -> None:
    """Unmodified: it says what it waits for, hears in time that there is nothing yet, and asks again by itself."""
    proxy = start_proxy(upstream={"n_mode": "parallel"})
    proxy.upstream.script = lambda received: Reply(hold=True)

    def release() -> None:
        joined(proxy, 1)
        proxy.upstream.release()

    watching = threading.Thread(target=release, daemon=True)
    watching.start()
    # More retries than the one that it takes: this machine may be slow to release.
    with proxy.client.with_options(timeout=1.0, max_retries=8) as client:
        raw = client.chat.completions.with_raw_response.create(
            model="m",
            messages=[{"role": "user", "content": "Hi"}],
            extra_body={"best_of": best_of, "winnow": {"strategy": strategy}},
        )
    watching.join(20)
    assert raw.headers["x-winnow-joined"] == "true"
    assert raw.parse().choices[0].message.content == "an answer"
    assert raw.headers["x-winnow-upstream-calls"] == str(calls)
    assert len(proxy.upstream.received) == calls


def test_what_came_before_the_deadline_is_no_reason_to_ask_again(proxy: RunningProxy) -> None:
    proxy.upstream.script = lambda received: Reply(texts=("good",), hold=received.number > 1)
    raw = proxy.client.with_options(timeout=1.0, max_retries=2).chat.completions.with_raw_response.create(
        model="m", messages=[{"role": "user", "content": "Hi"}], seed=1
    )
    assert raw.headers["x-winnow-candidates"] == "s=2;f=2;i=0"
    assert raw.retries_taken == 0
    proxy.upstream.wait_for(lambda upstream: upstream.cancelled == 2)


@WAYS
def test_a_client_that_does_not_come_again_costs_no_more_than_that(
    start_proxy: StartProxy, best_of: int, calls: int
) -> None:
    proxy = start_proxy(server={"deadline_linger_s": 0.2})
    proxy.upstream.script = lambda received: Reply(hold=True)
    with pytest.raises(openai.InternalServerError) as caught:
        proxy.client.with_options(timeout=0.4).chat.completions.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], seed=1, extra_body={"best_of": best_of}
        )
    assert caught.value.code == "deadline_exceeded"
    proxy.upstream.wait_for(lambda upstream: upstream.cancelled == calls)


def leave(proxy: RunningProxy, best_of: int, calls: int) -> None:
    """Asks as `Asking` does, and leaves when the upstream is at work."""
    import socket

    host, port = proxy.url.removeprefix("http://").split(":")
    raw = json.dumps(BODY | {"best_of": best_of}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: {len(raw)}\r\n"
        "content-type: application/json\r\nauthorization: Bearer k\r\nx-stainless-retry-count: 0\r\n\r\n"
    )
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(head.encode() + raw)
        proxy.upstream.wait_for(received(calls))
