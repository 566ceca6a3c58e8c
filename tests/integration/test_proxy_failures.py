"""What the client gets when something goes wrong: before, behind or inside the proxy."""

from __future__ import annotations

import json
import urllib.request
from typing import Any

import openai
import pytest

from reward.errors import QueueFullError, ScoringError
from tests.conftest import RunningProxy, StartProxy
from tests.fakes.upstream import Received, Reply, error_reply

MESSAGES = [{"role": "user", "content": "Say something."}]


def ask(proxy: RunningProxy, **kwargs: Any) -> Any:
    return proxy.client.chat.completions.with_raw_response.create(**({"model": "m", "messages": MESSAGES} | kwargs))


def post(url: str, body: bytes, method: str = "POST") -> tuple[int, dict[str, Any], dict[str, str]]:
    request = urllib.request.Request(url, body, {"content-type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return response.status, json.loads(response.read()), dict(response.headers.items())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read()), dict(error.headers.items())


@pytest.mark.parametrize("best_of", [1, 4])
@pytest.mark.parametrize(
    ("status", "error"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (503, openai.InternalServerError),
    ],
)
def test_upstream_errors_keep_status_and_body(
    proxy: RunningProxy, status: int, error: type[openai.APIStatusError], best_of: int
) -> None:
    proxy.upstream.script = lambda received: error_reply(status, "scripted_code", retry_after="7")
    with pytest.raises(error) as caught:
        ask(proxy, extra_body={"best_of": best_of})
    assert caught.value.code == "scripted_code"
    assert caught.value.type == "scripted"
    assert caught.value.param == "p"
    assert caught.value.request_id
    assert caught.value.response.headers["retry-after"] == "7"


def test_streamed_upstream_errors_keep_their_status(proxy: RunningProxy) -> None:
    proxy.upstream.script = lambda received: error_reply(429, "slow_down", retry_after_ms="30")
    with pytest.raises(openai.RateLimitError) as caught:
        ask(proxy, stream=True)
    assert caught.value.code == "slow_down"
    assert caught.value.response.headers["retry-after-ms"] == "30"


def test_errors_that_are_no_envelope_get_one(proxy: RunningProxy) -> None:
    proxy.upstream.script = lambda received: Reply(status=503, raw=b"<html>overloaded</html>")
    with pytest.raises(openai.InternalServerError) as caught:
        ask(proxy)
    assert caught.value.type == "upstream_error"
    assert "overloaded" in str(caught.value)


def test_one_failing_candidate_fails_nothing(proxy: RunningProxy) -> None:
    proxy.upstream.script = lambda received: (
        error_reply(500) if received.number == 1 else Reply(texts=("bad", "good", "so", "good good"))
    )
    raw = ask(proxy, seed=1)
    assert raw.parse().choices[0].message.content == "good good"
    assert raw.headers["x-winnow-candidates"] == "s=3;f=1;i=0"


def test_fewer_answers_than_min_candidates_fail(start_proxy: StartProxy) -> None:
    proxy = start_proxy(route={"min_candidates": 2})
    proxy.upstream.script = lambda received: Reply() if received.number == 2 else error_reply(429, retry_after="3")
    with pytest.raises(openai.RateLimitError) as caught:
        ask(proxy, seed=1)
    assert caught.value.response.headers["retry-after"] == "3"


def test_malformed_answers_are_failures(proxy: RunningProxy) -> None:
    for raw in (b'{"id": "x', b"[]", b'{"choices": []}', b'{"error": {"message": "inside a 200"}}'):
        proxy.upstream.script = lambda received, raw=raw: Reply(raw=raw)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(proxy)
        assert caught.value.status_code == 502


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "choice",
    [
        {"text": ["bad"]},
        {"delta": "bad"},
        {"message": {"content": "bad", "tool_calls": 5}, "delta": {"content": "bad", "tool_calls": 5}},
        {"message": {"tool_calls": [["f"]]}, "delta": {"tool_calls": [["f"]]}},
        {
            "message": {"tool_calls": [{"function": {"name": []}}]},
            "delta": {"tool_calls": [{"function": {"name": []}}]},
        },
        5,
    ],
)
def test_a_choice_in_no_form_we_know_costs_one_candidate(proxy: RunningProxy, choice: object, stream: bool) -> None:
    body = json.dumps({"id": "x", "choices": [choice]})
    whole, streamed = (
        Reply(raw=body.encode()),
        Reply(raw=f"data: {body}\n\ndata: [DONE]\n\n".encode(), headers={"content-type": "text/event-stream"}),
    )
    proxy.upstream.script = lambda received: Reply() if received.number else streamed if stream else whole
    tools: Any = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    raw = ask(proxy, seed=1, stream=stream, tools=tools)
    assert raw.headers["x-winnow-candidates"] == "s=3;f=1;i=0"


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_in_no_form_we_know_costs_one_candidate(proxy: RunningProxy, stream: bool) -> None:
    call = {"type": "function_call", "name": ["f"], "arguments": "{}", "call_id": "c", "id": "i"}
    proxy.upstream.script = lambda received: Reply(response={} if received.number else {"output": [call]})
    raw: Any = proxy.client.responses.with_raw_response.create(
        model="m",
        input="Hi",
        stream=stream,
        tools=[{"type": "function", "name": "f", "parameters": {}, "strict": False}],
        extra_body={"best_of": 3},
    )
    assert raw.headers["x-winnow-candidates"] == "s=2;f=1;i=0"


def test_unreachable_upstream(start_proxy: StartProxy) -> None:
    proxy = start_proxy(upstream={"url": "http://127.0.0.1:9/v1"})
    for best_of in (1, 2):
        with pytest.raises(openai.InternalServerError) as caught:
            ask(proxy, extra_body={"best_of": best_of})
        assert caught.value.status_code == 502
        assert caught.value.code == "upstream_connect"


class TestStreamsThatBreak:
    def test_a_cut_candidate_loses(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: Reply(texts=("good",), cut_after=2 if received.number else None)
        raw = ask(proxy, stream=True)
        assert raw.headers["x-winnow-candidates"] == "s=1;f=3;i=0"
        text = "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse())
        assert text == "good"

    def test_all_cut_is_an_error_not_an_end(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: Reply(cut_after=2)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(proxy, stream=True)
        assert caught.value.status_code == 502

    def test_pass_through_says_so_in_the_stream(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: Reply(cut_after=2)
        with pytest.raises(openai.APIError, match="broke off"):
            list(ask(proxy, stream=True, extra_body={"best_of": 1}).parse())

    def test_error_after_a_keepalive_is_an_event_without_done(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(server={"keepalive_s": 0.05})
        proxy.upstream.script = lambda received: Reply(status=429, raw=error_reply(429, "late").raw, hold=True)
        with proxy.client.chat.completions.with_streaming_response.create(
            model="m", messages=MESSAGES, stream=True
        ) as response:
            assert response.status_code == 200
            lines = response.iter_lines()
            assert next(lines) == ": keepalive"
            proxy.upstream.release()
            rest = [line for line in lines if line and line != ": keepalive"]
        assert len(rest) == 1
        assert json.loads(rest[0].removeprefix("data: "))["error"]["code"] == "late"


def test_keepalives_come_before_the_winner(start_proxy: StartProxy) -> None:
    proxy = start_proxy(server={"keepalive_s": 0.05})
    proxy.upstream.script = lambda received: Reply(texts=("good",), hold=True)
    with proxy.client.chat.completions.with_streaming_response.create(
        model="m", messages=MESSAGES, stream=True
    ) as response:
        assert response.headers["x-request-id"]
        lines = response.iter_lines()
        assert next(lines) == ": keepalive"
        proxy.upstream.release()
        lines = [line for line in lines if line and line != ": keepalive"]
    assert lines[-1] == "data: [DONE]"
    assert all(line.startswith("data: ") for line in lines)


def test_an_upstream_that_does_not_stream_is_replayed_all_the_same(proxy: RunningProxy) -> None:
    proxy.upstream.script = lambda received: Reply(texts=("bad", "good words"), streams=False)
    chunks = list(ask(proxy, stream=True).parse())
    assert [chunk.object for chunk in chunks] == ["chat.completion.chunk"]
    assert chunks[0].choices[0].delta.content == "good words"
    assert chunks[0].choices[0].finish_reason == "stop"


class TestRewardFailure:
    def test_first_valid_candidate_marked_unscored(self, proxy: RunningProxy) -> None:
        proxy.scorer.failure = ScoringError("the model broke")
        proxy.upstream.script = lambda received: Reply(texts=("", "first", "good"))
        raw = ask(proxy)
        assert raw.parse().choices[0].message.content == "first"
        assert raw.headers["x-winnow-scored"] == "false"
        assert "x-winnow-reward" not in raw.headers
        assert proxy.metric("winnow_reward_failures_total", route="default") == 1

    def test_error(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(route={"on_reward_failure": "error"})
        proxy.scorer.failure = QueueFullError("full", 4)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(proxy)
        assert caught.value.status_code == 503
        assert caught.value.code == "reward_model_unavailable"
        assert caught.value.response.headers["retry-after"] == "4"

    def test_a_bug_in_the_scorer_is_a_500_in_the_envelope(self, proxy: RunningProxy) -> None:
        proxy.scorer.failure = ZeroDivisionError("secret detail")
        with pytest.raises(openai.InternalServerError) as caught:
            ask(proxy)
        assert caught.value.code == "internal_error"
        assert caught.value.request_id
        assert "secret" not in str(caught.value)


class TestDeadline:
    def test_those_that_are_there_compete(self, proxy: RunningProxy) -> None:
        def script(received: Received) -> Reply:
            return Reply(texts=("good",), hold=received.number == 0)

        proxy.upstream.script = script
        raw = ask(proxy, seed=1, extra_body={"winnow": {"deadline_s": 0.5}})
        assert raw.headers["x-winnow-candidates"] == "s=3;f=1;i=0"
        proxy.upstream.wait_for(lambda upstream: upstream.cancelled == 1)
        assert proxy.metric("winnow_candidates_total", route="default", outcome="cancelled") == 1

    @pytest.mark.parametrize("body", [{"seed": 1}, {}, {"best_of": 1}])
    def test_none_is_a_504(self, proxy: RunningProxy, body: dict[str, Any]) -> None:
        proxy.upstream.script = lambda received: Reply(hold=True)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(proxy, extra_body=body | {"winnow": {"deadline_s": 0.3}})
        assert caught.value.status_code == 504
        assert caught.value.code == "deadline_exceeded"

    def test_the_clients_own_time_out_is_one(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(route={"deadline_margin_s": 10})
        proxy.upstream.script = lambda received: Reply(hold=True)
        with pytest.raises(openai.InternalServerError) as caught:
            proxy.client.with_options(timeout=4).chat.completions.create(model="m", messages=MESSAGES)
        assert caught.value.status_code == 504


class TestClientLeaves:
    """Nobody reads the answer: every upstream call must end, at once."""

    @pytest.mark.parametrize(
        ("body", "calls"),
        [
            ({}, 1),
            ({"seed": 1}, 4),
            ({"stream": True}, 4),
            ({"best_of": 1}, 1),
            ({"best_of": 1, "stream": True}, 1),
        ],
    )
    def test_before_the_answer(self, start_proxy: StartProxy, body: dict[str, Any], calls: int) -> None:
        proxy = start_proxy()
        proxy.upstream.script = lambda received: Reply(hold=True)
        with open_request(proxy, {"model": "m", "messages": MESSAGES} | body):
            proxy.upstream.wait_for(lambda upstream: len(upstream.received) == calls)
        proxy.upstream.wait_for(lambda upstream: upstream.cancelled == calls)
        assert proxy.upstream.finished == 0
        assert not proxy.scorer.scored

    def test_between_keepalives(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(server={"keepalive_s": 0.05})
        proxy.upstream.script = lambda received: Reply(hold_after=2)
        with open_request(proxy, {"model": "m", "messages": MESSAGES, "stream": True}) as connection:
            received = b""
            while b": keepalive" not in received:
                received += connection.recv(4096)
        proxy.upstream.wait_for(lambda upstream: upstream.cancelled == 4)

    def test_in_a_passed_through_stream(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: Reply(hold_after=2)
        with open_request(proxy, {"model": "m", "messages": MESSAGES, "stream": True, "best_of": 1}) as connection:
            received = b""
            while b"data:" not in received:
                received += connection.recv(4096)
        proxy.upstream.wait_for(lambda upstream: upstream.cancelled == 1)


def open_request(proxy: RunningProxy, body: dict[str, Any]) -> Any:
    """A bare connection with a request on it; closing it is leaving."""
    import socket

    host, port = proxy.url.removeprefix("http://").split(":")
    connection = socket.create_connection((host, int(port)), timeout=20)
    raw = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: {len(raw)}\r\n\r\n"
    connection.sendall(head.encode() + raw)
    return connection


def test_max_in_flight(start_proxy: StartProxy) -> None:
    proxy = start_proxy(server={"max_in_flight": 1})
    proxy.upstream.script = lambda received: Reply(hold=True)
    with open_request(proxy, {"model": "m", "messages": MESSAGES}):
        proxy.upstream.wait_for(lambda upstream: len(upstream.received) == 1)
        assert proxy.metric("winnow_in_flight") == 1
        with pytest.raises(openai.RateLimitError) as caught:
            ask(proxy)
        assert caught.value.code == "max_in_flight"
        assert caught.value.response.headers["retry-after"] == "1"
    assert len(proxy.upstream.received) == 1


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"3",
        b'{"model": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"n": ' + b"9" * 400 + b"}",
        b"\xff\xfe",
        b'{"model": "m"}',
        b'{"messages": []}',
        b'{"messages": "hi"}',
        b'{"messages": [1]}',
        b'{"messages": [{"content": "no role"}]}',
        b'{"messages": [{"role": "user", "content": 5}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "n": 0}',
        b'{"messages": [{"role": "user", "content": "x"}], "n": "2"}',
        b'{"messages": [{"role": "user", "content": "x"}], "n": true}',
        b'{"messages": [{"role": "user", "content": "x"}], "best_of": 2, "n": 3}',
        b'{"messages": [{"role": "user", "content": "x"}], "best_of": 65}',
        b'{"messages": [{"role": "user", "content": "x"}], "best_of": 0}',
        b'{"messages": [{"role": "user", "content": "x"}], "stream": "yes"}',
        b'{"messages": [{"role": "user", "content": "x"}], "model": 5}',
        b'{"messages": [{"role": "user", "content": "x"}], "winnow": []}',
        b'{"messages": [{"role": "user", "content": "x"}], "winnow": {"min_reward": "20"}}',
        b'{"messages": [{"role": "user", "content": "x"}], "winnow": {"strategy": "best"}}',
        b'{"messages": [{"role": "user", "content": "x"}], "winnow": {"on_reject": "fallback"}}',
        b'{"messages": [{"role": "user", "content": "x"}], "winnow": {"reward_model": "nope"}}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": 18446744073709551615}',
        b'{"messages": [{"role": "user", "content": "x"}], "deep": ' + b"[" * 500 + b"]" * 500 + b"}",
        b'{"messages": [{"role": "user", "content": "x"}], "model": "m@0"}',
    ],
)
def test_bad_requests_are_400_in_the_envelope(proxy: RunningProxy, body: bytes) -> None:
    status, answer, headers = post(f"{proxy.url}/v1/chat/completions", body)
    assert status == 400, answer
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert answer["error"]["type"] == "invalid_request_error"
    assert headers["x-request-id"]
    assert not proxy.upstream.received


def test_unknown_winnow_key_gets_a_hint(proxy: RunningProxy) -> None:
    with pytest.raises(openai.BadRequestError, match="did you mean return_candidates") as caught:
        ask(proxy, extra_body={"winnow": {"return_candidate": True}})
    assert caught.value.param == "winnow.return_candidate"


def test_body_over_the_limit(start_proxy: StartProxy) -> None:
    proxy = start_proxy(server={"max_body_bytes": 1024})
    with pytest.raises(openai.APIStatusError) as caught:
        ask(proxy, extra_body={"pad": "x" * 2000})
    assert caught.value.status_code == 413


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("POST", "/healthz", 405), ("GET", "/v2/x", 404)]
)
def test_the_frameworks_own_errors_are_envelopes(proxy: RunningProxy, method: str, path: str, status: int) -> None:
    found, answer, headers = post(f"{proxy.url}{path}", b"" if method == "POST" else None, method)  # type: ignore[arg-type]
    assert found == status
    assert set(answer["error"]) == {"message", "type", "param", "code"}
    assert headers["x-request-id"]


class TestTokenPrompts:
    def test_pass_through_by_default(self, proxy: RunningProxy) -> None:
        proxy.client.completions.create(model="m", prompt=[1, 2, 3])
        assert proxy.upstream.received[0].body["prompt"] == [1, 2, 3]
        assert "n" not in proxy.upstream.received[0].body

    def test_are_refused_with_a_reason_when_best_of_is_asked(self, proxy: RunningProxy) -> None:
        with pytest.raises(openai.BadRequestError, match="token ids"):
            proxy.client.completions.create(model="m", prompt=[1, 2, 3], best_of=2)

    def test_echo_without_generation_passes_through(self, proxy: RunningProxy) -> None:
        proxy.client.completions.create(model="m", prompt="p", echo=True, max_tokens=0, logprobs=1)
        assert len(proxy.upstream.received) == 1
        assert not proxy.scorer.scored
