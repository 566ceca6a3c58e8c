"""Every way an upstream fails, times how it is asked: what the client gets, what was called, what is left behind.

The proxy, the upstream and the real `openai` client live in one loop, so that a task or a connection left over is seen.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import httpx2
import openai
import pytest
from prometheus_client import CollectorRegistry

from proxy.app import Parts, create_app
from proxy.config_loading import load_settings
from proxy.upstreams.hosted import HostedUpstream
from tests.fakes import faulty
from tests.fakes.faulty import Fault, FaultyUpstream
from tests.fakes.scorer import FakeScorer

RETRIES = 2
SETTINGS: dict[str, dict[str, Any]] = {
    "upstream": {
        "connect_timeout_s": 5,
        "retry_backoff_s": 0.001,
        "retry_backoff_max_s": 0.001,
        "max_answer_bytes": 1024 * 1024,
    },
    "route": {"max_retries": RETRIES},
}
"""Time-outs are the usual ones, so that a busy machine fails nothing; where silence is the fault, see `impatient`."""


def impatient(case: Case, seconds: float = 0.3) -> dict[str, dict[str, Any]]:
    """Settings for a fault that only a time-out ends."""
    if case.code != "upstream_timeout":
        return {}
    total = 0.8 if case.fault is faulty.drip else 60
    return {
        "upstream": {
            "first_byte_timeout_s": seconds, "idle_timeout_s": seconds, "total_timeout_s": total * seconds / 0.3
        }
    }  # fmt: skip


@dataclass
class Rig:
    """A proxy between the real client and an upstream that misbehaves."""

    upstream: FaultyUpstream
    client: openai.AsyncOpenAI
    registry: CollectorRegistry

    async def ask(self, best_of: int, stream: bool) -> tuple[str, Any]:
        """The answer's text and its headers. Raises what the client raises."""
        raw = await self.client.chat.completions.with_raw_response.create(
            model="m", messages=[{"role": "user", "content": "Hi"}], stream=stream, extra_body={"best_of": best_of}
        )
        parsed: Any = raw.parse()
        if not stream:
            return parsed.choices[0].message.content, raw.headers
        async with contextlib.aclosing(parsed.response) as _:
            pieces = [chunk.choices[0].delta.content or "" async for chunk in parsed if chunk.choices]
        return "".join(pieces), raw.headers

    def retries(self) -> float:
        families = {family.name: family for family in self.registry.collect()}
        samples = families["winnow_upstream_retries"].samples
        return sum(sample.value for sample in samples if sample.name == "winnow_upstream_retries_total")


@contextlib.asynccontextmanager
async def rig(**sections: dict[str, Any]) -> AsyncIterator[Rig]:
    """Checks, on leaving, that nothing is left: no task, no connection to the upstream."""
    before = asyncio.all_tasks()
    upstream = FaultyUpstream()
    async with upstream.serving() as url:
        flags = {name: dict(values) for name, values in SETTINGS.items()}
        flags["upstream"]["url"] = url
        for name, values in sections.items():
            flags[name] = flags.get(name, {}) | values
        settings = load_settings(flags=flags)
        registry = CollectorRegistry()
        hosted = HostedUpstream(settings.upstream_settings(settings.default_upstream))
        app = create_app(settings, Parts({settings.default_upstream: hosted}, {"default": FakeScorer()}), registry).asgi
        transport = httpx2.ASGITransport(app=app)
        http_client = httpx2.AsyncClient(transport=transport)
        async with (
            app.router.lifespan_context(app),
            openai.AsyncOpenAI(
                base_url="http://localhost/v1", api_key="k", max_retries=0, timeout=20, http_client=http_client
            ) as client,
        ):
            yield Rig(upstream, client, registry)
            await upstream.all_closed()
    async with asyncio.timeout(10):
        while left := asyncio.all_tasks() - before:
            await asyncio.wait(left)


@dataclass(frozen=True)
class Case:
    """A fault and what it must come to. `calls` of a request whose every call fails: see `expected_calls`."""

    name: str
    fault: Fault
    status: int
    error: type[openai.APIError]
    code: str | None
    retried: bool = True
    should_retry: str | None = "false"
    streamed_once: type[Exception] | None = None
    """What ends a stream of one candidate, where the fault comes after its first bytes: those have been passed on."""


HTML = faulty.whole(b"<html>welcome</html>", content_type="text/html")
CASES = [
    Case("400", faulty.error(400, "c"), 400, openai.BadRequestError, "c", retried=False, should_retry=None),
    Case("401", faulty.error(401, "c"), 401, openai.AuthenticationError, "c", retried=False, should_retry=None),
    Case("404", faulty.error(404, "c"), 404, openai.NotFoundError, "c", retried=False, should_retry=None),
    Case("408", faulty.error(408, "c"), 408, openai.APIStatusError, "c"),
    Case("409", faulty.error(409, "c"), 409, openai.ConflictError, "c"),
    Case("429 rate", faulty.error(429, "rate_limit_exceeded"), 429, openai.RateLimitError, "rate_limit_exceeded"),
    Case(
        "429 rate, back soon", faulty.error(429, "c", retry_after_ms="5"), 429, openai.RateLimitError, "c"
    ),
    Case(
        "429 rate, back late", faulty.error(429, "c", retry_after="60"), 429, openai.RateLimitError, "c",
        retried=False, should_retry=None,
    ),
    Case(
        "429 quota", faulty.error(429, "insufficient_quota"), 429, openai.RateLimitError, "insufficient_quota",
        retried=False,
    ),
    Case("500", faulty.error(500, "c"), 500, openai.InternalServerError, "c"),
    Case("503", faulty.error(503, "c"), 503, openai.InternalServerError, "c"),
    Case(
        "503, not to be retried", faulty.error(503, "c", x_should_retry="false"), 503, openai.InternalServerError, "c",
        retried=False,
    ),
    Case("reset", faulty.reset, 502, openai.InternalServerError, "upstream_broken"),
    Case(
        "hang before headers", faulty.hang, 504, openai.InternalServerError, "upstream_timeout",
        retried=False, should_retry=None,
    ),
    Case(
        "hang mid-body", faulty.hang_in_body, 504, openai.InternalServerError, "upstream_timeout",
        retried=False, should_retry=None, streamed_once=openai.APIError,
    ),
    Case(
        "slow drip", faulty.drip, 504, openai.InternalServerError, "upstream_timeout",
        retried=False, should_retry=None, streamed_once=openai.APIError,
    ),
    Case(
        "cut mid-body", faulty.cut, 502, openai.InternalServerError, "upstream_broken",
        streamed_once=openai.APIError,
    ),
    Case(
        "reset mid-body", faulty.reset_in_body, 502, openai.InternalServerError, "upstream_broken",
        streamed_once=openai.APIError,
    ),
    Case(
        "truncated JSON", faulty.whole(b'{"id": "c", "choices": [{"ind', content_type="application/json"), 502,
        openai.InternalServerError, "upstream_malformed",
    ),
    Case("wrong content type", HTML, 502, openai.InternalServerError, "upstream_malformed"),
    Case("empty body", faulty.whole(b""), 502, openai.InternalServerError, "upstream_malformed"),
    Case(
        "error inside a 200", faulty.whole(b'{"error": {"message": "m", "code": 502}}'), 502,
        openai.InternalServerError, None,
    ),
    Case(
        "too large", faulty.whole(b" " * (2 * 1024 * 1024)), 502, openai.InternalServerError, "upstream_too_large",
        retried=False, should_retry=None,
    ),
    Case(
        "redirect", faulty.error(307, location="http://127.0.0.1:9/v1"), 502, openai.InternalServerError, None,
        retried=False, should_retry=None,
    ),
    Case(
        "header too large", faulty.whole(b"{}", x_much="x" * 20_000), 502, openai.InternalServerError, "upstream_broken"
    ),
]  # fmt: skip
WAYS = pytest.mark.parametrize(("best_of", "stream"), [(1, False), (1, True), (4, False), (4, True)])
NAMED = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def expected_calls(case: Case, best_of: int, stream: bool) -> int:
    first = best_of if stream else 1
    if case.status == 400 and best_of > 1 and not stream:
        first += 1  # Was it `n` that it refused? The same is asked once more without.
    return first + (RETRIES if case.retried else 0)


@WAYS
@NAMED
async def test_every_call_fails(case: Case, best_of: int, stream: bool) -> None:
    async with rig(**impatient(case)) as it:
        it.upstream.script = lambda asked: case.fault
        if case.streamed_once is not None and stream and best_of == 1:
            with pytest.raises(case.streamed_once):
                await it.ask(best_of, stream)
            assert len(it.upstream.asked) == 1
            return
        with pytest.raises(case.error) as caught:
            await it.ask(best_of, stream)
        error = caught.value
        assert isinstance(error, openai.APIStatusError)
        assert error.status_code == case.status
        body = json.loads(error.response.content)
        assert set(body["error"]) == {"message", "type", "param", "code"}
        assert body["error"]["code"] == case.code or case.code is None
        assert error.response.headers.get("x-should-retry") == case.should_retry
        assert error.request_id
        assert len(it.upstream.asked) == expected_calls(case, best_of, stream)
        assert it.retries() == (RETRIES if case.retried else 0)


@WAYS
@pytest.mark.parametrize("case", [case for case in CASES if case.retried], ids=lambda case: case.name)
async def test_the_first_call_fails_and_its_retry_succeeds(case: Case, best_of: int, stream: bool) -> None:
    if case.streamed_once is not None and stream and best_of == 1:
        return  # Its first bytes are with the client; `test_every_call_fails` shows how that ends.
    async with rig() as it:
        it.upstream.script = lambda asked: case.fault if asked.number == 0 else faulty.good
        text, headers = await it.ask(best_of, stream)
        assert text == "good"
        calls = len(it.upstream.asked)
        # Of four streams three are enough: the failed one is only tried again if that is sooner.
        assert calls in ((4, 5) if stream and best_of == 4 else (2,))
        assert headers["x-winnow-upstream-calls"] == str(calls)


@pytest.mark.parametrize("stream", [False, True])
@NAMED
async def test_one_of_four_fails_for_ever(case: Case, stream: bool) -> None:
    """Drawn by parallel calls; the other three compete."""
    settings = impatient(case, seconds=0.9)
    settings["upstream"] = settings.get("upstream", {}) | {"n_mode": "parallel"}
    async with rig(**settings) as it:
        it.upstream.script = lambda asked: faulty.good if asked.number in (1, 2, 3) else case.fault
        text, headers = await it.ask(4, stream)
        assert text == "good"
        assert headers["x-winnow-candidates"] == "s=3;f=1;i=0"


@WAYS
async def test_connection_refused(best_of: int, stream: bool) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # Bound, and nobody listens.
        async with rig(upstream={"url": f"http://127.0.0.1:{taken.getsockname()[1]}/v1"}) as it:
            with pytest.raises(openai.InternalServerError) as caught:
                await it.ask(best_of, stream)
            assert (caught.value.status_code, caught.value.code) == (502, "upstream_connect")
            assert it.retries() == RETRIES


async def test_malformed_events_of_one_candidate_go_through_as_they_are() -> None:
    """Nobody reads a stream that is passed on: the client hears of it from its own parser."""
    async with rig() as it:
        it.upstream.script = lambda asked: faulty.malformed_events
        with pytest.raises(json.JSONDecodeError):
            await it.ask(1, stream=True)
        assert len(it.upstream.asked) == 1


async def test_malformed_events_of_candidates_are_failures() -> None:
    async with rig() as it:
        it.upstream.script = lambda asked: faulty.malformed_events if asked.number != 2 else faulty.good
        text, headers = await it.ask(4, stream=True)
        assert text == "good"
        assert headers["x-winnow-candidates"].startswith("s=1;f=3")
        it.upstream.script = lambda asked: faulty.malformed_events
        with pytest.raises(openai.InternalServerError) as caught:
            await it.ask(4, stream=True)
        assert caught.value.code == "upstream_malformed"


@pytest.mark.parametrize("best_of", [1, 4])
async def test_the_clients_own_retries_get_less(best_of: int) -> None:
    async with rig() as it:
        it.upstream.script = lambda asked: faulty.error(503)
        for count, retries in ((0, 2), (1, 1), (2, 0)):
            before = len(it.upstream.asked)
            with pytest.raises(openai.InternalServerError):
                await it.client.chat.completions.create(
                    model="m",
                    messages=[{"role": "user", "content": "Hi"}],
                    extra_body={"best_of": best_of},
                    extra_headers={"x-stainless-retry-count": str(count)},
                )
            assert len(it.upstream.asked) - before == 1 + retries


@pytest.mark.parametrize("best_of", [1, 4])
@pytest.mark.parametrize("status", [401, 403])
async def test_our_own_key_refused_is_not_the_clients_fault(best_of: int, status: int) -> None:
    async with rig(upstream={"key": "sk-secret-of-ours"}) as it:
        body = json.dumps({"error": {"message": "Incorrect API key: sk-secret-of-ours", "code": "invalid_api_key"}})

        async def refuses(wire: faulty.Wire, asked: faulty.Asked) -> None:
            assert asked.headers["authorization"] == "Bearer sk-secret-of-ours"
            await wire.head(status, len(body), content_type="application/json", www_authenticate="Bearer")
            await wire.send(body.encode())

        it.upstream.script = lambda asked: refuses
        with pytest.raises(openai.InternalServerError) as caught:
            await it.ask(best_of, stream=False)
        assert (caught.value.status_code, caught.value.code) == (502, "upstream_authentication")
        assert b"sk-secret" not in caught.value.response.content
        assert "www-authenticate" not in caught.value.response.headers
        assert len(it.upstream.asked) == 1


@pytest.mark.parametrize("best_of", [1, 4])
async def test_our_key_is_taken_out_of_errors(best_of: int) -> None:
    async with rig(upstream={"key": "sk-secret-of-ours"}) as it:
        it.upstream.script = lambda asked: faulty.error(400, "sk-secret-of-ours")
        with pytest.raises(openai.BadRequestError) as caught:
            await it.ask(best_of, stream=False)
        assert caught.value.code == "[redacted]*******"


async def test_the_circuit_opens_and_says_when_to_come_back() -> None:
    async with rig(upstream={"circuit_min_calls": 3, "circuit_open_s": 1000}, route={"max_retries": 0}) as it:
        it.upstream.script = lambda asked: faulty.error(500)
        for _ in range(3):
            with pytest.raises(openai.InternalServerError):
                await it.ask(1, stream=False)
        for best_of, stream in ((1, False), (1, True), (4, False), (4, True)):
            with pytest.raises(openai.InternalServerError) as caught:
                await it.ask(best_of, stream)
            assert (caught.value.status_code, caught.value.code) == (503, "upstream_circuit_open")
            assert 900 < int(caught.value.response.headers["retry-after"]) <= 1000
        assert len(it.upstream.asked) == 3


async def test_calls_beyond_the_limit_wait_and_beyond_the_line_are_refused() -> None:
    async with rig(
        upstream={"max_connections": 2, "max_waiting": 1, "first_byte_timeout_s": 30, "n_mode": "parallel"}
    ) as it:
        running = asyncio.Event()
        release = asyncio.Event()
        most = 0

        async def waits(wire: faulty.Wire, asked: faulty.Asked) -> None:
            nonlocal most
            most = max(most, it.upstream.num_open)
            if it.upstream.num_open == 2:
                running.set()
            await release.wait()
            await faulty.good(wire, asked)

        it.upstream.script = lambda asked: waits
        asking = asyncio.create_task(it.ask(4, stream=False))
        await running.wait()
        release.set()
        text, headers = await asking
        assert text == "good"
        assert headers["x-winnow-candidates"] == "s=3;f=1;i=0"
        assert most == 2
