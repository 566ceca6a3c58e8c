"""A route whose upstream fails, and those that stand in for it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from proxy.config_loading import ConfigError, load_settings
from tests.conftest import RunningProxy, StartProxy
from tests.fakes.serving import serving
from tests.fakes.upstream import FakeUpstream, Reply, error_reply

MESSAGES: list[Any] = [{"role": "user", "content": "Hi"}]
ROUTES = {
    "main": {"model": "m1", "fallback_routes": ["main", "spare", "last"]},
    "spare": {"upstream": "other", "model": "m2", "best_of": 1},
    "last": {"upstream": "third", "model": "m3"},
}
WAYS = pytest.mark.parametrize(("best_of", "stream"), [(1, False), (1, True), (4, False), (4, True)])


@pytest.fixture
def others() -> Iterator[tuple[FakeUpstream, FakeUpstream, dict[str, Any]]]:
    other, third = FakeUpstream(), FakeUpstream()
    with serving(other) as other_url, serving(third) as third_url:
        upstreams = {
            "other": {"url": f"{other_url}/v1", "key": "sk-other"},
            "third": {"url": f"{third_url}/v1", "key": "sk-third"},
        }
        yield other, third, {"upstreams": upstreams, "routes": ROUTES}


def ask(proxy: RunningProxy, best_of: int, stream: bool) -> tuple[str, Any]:
    raw: Any = proxy.client.chat.completions.with_raw_response.create(
        model="main", messages=MESSAGES, stream=stream, extra_body={"best_of": best_of}
    )
    parsed = raw.parse()
    if not stream:
        return parsed.choices[0].message.content, raw.headers
    return "".join(chunk.choices[0].delta.content or "" for chunk in parsed), raw.headers


@WAYS
def test_the_next_one_that_can_answers(
    start_proxy: StartProxy, others: tuple[FakeUpstream, FakeUpstream, dict[str, Any]], best_of: int, stream: bool
) -> None:
    other, third, sections = others
    proxy = start_proxy(**sections)
    proxy.upstream.script = lambda received: error_reply(503)
    other.script = lambda received: error_reply(429)
    third.script = lambda received: Reply(texts=("from the third",))
    text, headers = ask(proxy, best_of, stream)
    assert text == "from the third"
    assert headers["x-winnow-fallback"] == "last"
    for received in third.received:
        assert received.body["model"] == "m3"
        assert received.headers["authorization"] == "Bearer sk-third"
    assert {received.body["model"] for received in proxy.upstream.received} == {"m1"}
    assert proxy.metric("winnow_fallbacks_total", route="main", fallback="last") == 1


@WAYS
def test_if_none_can_the_first_ones_error_is_told(
    start_proxy: StartProxy, others: tuple[FakeUpstream, FakeUpstream, dict[str, Any]], best_of: int, stream: bool
) -> None:
    other, third, sections = others
    proxy = start_proxy(**sections)
    proxy.upstream.script = lambda received: error_reply(503, "first")
    other.script = third.script = lambda received: error_reply(500, "later")
    with pytest.raises(openai.InternalServerError) as caught:
        ask(proxy, best_of, stream)
    assert (caught.value.status_code, caught.value.code) == (503, "first")
    assert other.received and third.received


@pytest.mark.parametrize("strategy", ["best_of_n", "adaptive", "speculative"])
def test_answers_teach_the_route_that_gave_them(
    start_proxy: StartProxy, others: tuple[FakeUpstream, FakeUpstream, dict[str, Any]], strategy: str
) -> None:
    _, _, sections = others
    sections["upstreams"]["other"]["n_mode"] = "parallel"
    proxy = start_proxy(**sections)
    proxy.upstream.script = lambda received: error_reply(503)
    proxy.client.chat.completions.create(
        model="main", messages=MESSAGES, extra_body={"best_of": 4, "winnow": {"strategy": strategy}}
    )
    histories = proxy.app.live.gateway.histories
    assert len(histories.durations("spare")) > 0
    assert len(histories.durations("main")) == 0
    if strategy != "speculative":  # it cancels by rewards: what is left is no fair sample
        assert len(histories.rewards("spare", proxy.scorer.name).prior().sample) > 0
    assert len(histories.rewards("main", proxy.scorer.name).prior().sample) == 0


@WAYS
@pytest.mark.parametrize("status", [400, 401, 404])
def test_the_requests_own_faults_stay_where_they_are(
    start_proxy: StartProxy,
    others: tuple[FakeUpstream, FakeUpstream, dict[str, Any]],
    best_of: int,
    stream: bool,
    status: int,
) -> None:
    other, _, sections = others
    proxy = start_proxy(**sections)
    proxy.upstream.script = lambda received: error_reply(status)
    with pytest.raises(openai.APIStatusError) as caught:
        ask(proxy, best_of, stream)
    assert caught.value.status_code == status
    assert not other.received


def test_as_long_as_the_first_answers_nobody_else_is_asked(
    start_proxy: StartProxy, others: tuple[FakeUpstream, FakeUpstream, dict[str, Any]]
) -> None:
    other, _, sections = others
    proxy = start_proxy(**sections)
    _, headers = ask(proxy, 4, stream=False)
    assert "x-winnow-fallback" not in headers
    assert not other.received


def test_an_open_circuit_leads_elsewhere_at_once(
    start_proxy: StartProxy, others: tuple[FakeUpstream, FakeUpstream, dict[str, Any]]
) -> None:
    _, _, sections = others
    proxy = start_proxy(upstream={"circuit_min_calls": 2, "circuit_open_s": 1000}, **sections)
    proxy.upstream.script = lambda received: error_reply(500)
    for _ in range(5):
        assert ask(proxy, 1, stream=False)[1]["x-winnow-fallback"] == "spare"
    assert len(proxy.upstream.received) == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"routes": {"a": {"fallback_routes": ["spair"]}, "spare": {}}}, "did you mean spare"),
        (
            {
                "upstream": {"url": "http://a/v1"},
                "upstreams": {"other": {"url": "http://b/v1"}},
                "routes": {"a": {"fallback_routes": ["spare"]}, "spare": {"upstream": "other"}},
            },
            "would send clients' keys for upstream to other",
        ),
    ],
)
def test_bad_configurations_are_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_settings(flags=flags)
