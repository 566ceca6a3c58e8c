"""Validity, rejection and the ways of asking for N, over real HTTP."""

from __future__ import annotations

import time
from typing import Any

import openai
import pytest

from tests.conftest import RunningProxy, StartProxy
from tests.fakes.upstream import Received, Reply, error_reply

MESSAGES = [{"role": "user", "content": "Say something."}]
SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": SCHEMA}}]


def ask(proxy: RunningProxy, **kwargs: Any) -> Any:
    return proxy.client.chat.completions.with_raw_response.create(**({"model": "m", "messages": MESSAGES} | kwargs))


def call(name: str, arguments: str) -> dict[str, Any]:
    function = {"name": name, "arguments": arguments}
    message = {
        "role": "assistant",
        "content": None,
        "tool_calls": [{"id": "c", "type": "function", "function": function}],
    }
    return {"message": message, "finish_reason": "tool_calls"}


@pytest.mark.parametrize("stream", [False, True])
class TestValidity:
    def test_schema_beats_reward(self, proxy: RunningProxy, stream: bool) -> None:
        proxy.upstream.script = lambda received: Reply(texts=("good good", '{"x": "good"}', '{"x": 1}', ""))
        raw = ask(proxy, response_format=JSON_SCHEMA, stream=stream)
        assert text_of(raw, stream) == '{"x": 1}'
        assert raw.headers["x-winnow-candidates"] == "s=1;f=0;i=3"

    def test_json_object(self, proxy: RunningProxy, stream: bool) -> None:
        proxy.upstream.script = lambda received: Reply(texts=("good good", "[1]", "{}", "good"))
        raw = ask(proxy, response_format={"type": "json_object"}, stream=stream)
        assert text_of(raw, stream) == "{}"

    def test_tool_arguments(self, proxy: RunningProxy, stream: bool) -> None:
        calls = (call("look", "{"), call("look", '{"x": "1"}'), call("look", '{"x": 1}'), call("other", "{}"))
        proxy.upstream.script = lambda received: Reply(choice=calls[received.number])
        raw = ask(proxy, tools=TOOLS, seed=1, stream=stream)
        assert raw.headers["x-winnow-candidates"] == "s=1;f=0;i=3"
        if stream:
            deltas = [tool for chunk in raw.parse() for tool in chunk.choices[0].delta.tool_calls or []]
            assert "".join(delta.function.arguments for delta in deltas) == '{"x": 1}'
        else:
            choice = raw.parse().choices[0]
            assert choice.message.tool_calls[0].function.arguments == '{"x": 1}'
            assert choice.finish_reason == "tool_calls"

    def test_required_tool(self, proxy: RunningProxy, stream: bool) -> None:
        proxy.upstream.script = lambda received: (
            Reply(choice=call("look", '{"x": 2}')) if received.number == 3 else Reply(texts=("good",))
        )
        raw = ask(proxy, tools=TOOLS, tool_choice="required", seed=1, stream=stream)
        assert raw.headers["x-winnow-candidates"] == "s=1;f=0;i=3"

    def test_filtered_and_empty_lose(self, proxy: RunningProxy, stream: bool) -> None:
        def script(received: Received) -> Reply:
            if received.number == 0:
                return Reply(texts=("good good",), choice={"finish_reason": "content_filter"})
            return Reply(texts=("", " ", "bad", "\n"))

        proxy.upstream.script = script
        raw = ask(proxy, seed=1, stream=stream)
        assert text_of(raw, stream) == "bad"
        assert raw.headers["x-winnow-candidates"] == "s=1;f=0;i=3"

    def test_all_invalid_gives_the_least_bad_not_accepted(self, proxy: RunningProxy, stream: bool) -> None:
        proxy.upstream.script = lambda received: Reply(texts=("bad", "good", "", "so"))
        raw = ask(proxy, response_format={"type": "json_object"}, stream=stream)
        assert text_of(raw, stream) == "good"
        assert raw.headers["x-winnow-accepted"] == "false"
        assert raw.headers["x-winnow-candidates"] == "s=0;f=0;i=4"


def text_of(raw: Any, stream: bool) -> str:
    if stream:
        return "".join(chunk.choices[0].delta.content or "" for chunk in raw.parse())
    return str(raw.parse().choices[0].message.content)


def test_a_refusal_of_the_model_is_a_valid_answer(proxy: RunningProxy) -> None:
    message = {"role": "assistant", "content": None, "refusal": "I would rather not."}
    proxy.upstream.script = lambda received: Reply(choice={"message": message})
    raw = ask(proxy, response_format=JSON_SCHEMA)
    assert raw.parse().choices[0].message.refusal == "I would rather not."
    assert raw.headers["x-winnow-accepted"] == "true"


def test_truncated_answers_pay_a_penalty(proxy: RunningProxy) -> None:
    proxy.upstream.script = lambda received: (
        Reply(texts=("good good good",), choice={"finish_reason": "length"})
        if received.number == 0
        else Reply(texts=("good good good", "bad"))
    )
    answer = ask(proxy, seed=1).parse()
    assert answer.choices[0].finish_reason == "stop"


def test_identical_candidates_are_scored_once(proxy: RunningProxy) -> None:
    proxy.upstream.script = lambda received: Reply(texts=("same", "same", "good", "same"))
    raw = ask(proxy)
    assert [len(completions) for _, completions in proxy.scorer.scored] == [2]
    assert raw.headers["x-winnow-candidates"] == "s=4;f=0;i=0"


def test_a_schema_elsewhere_is_refused_not_fetched(proxy: RunningProxy) -> None:
    schema = {"$ref": f"{proxy.url}/v1/models"}
    with pytest.raises(openai.BadRequestError, match="not fetched"):
        ask(proxy, response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": schema}})
    assert not proxy.upstream.others


class TestRejection:
    def test_best_is_returned_marked(self, proxy: RunningProxy) -> None:
        raw = ask(proxy, extra_body={"winnow": {"min_reward": 5}})
        assert raw.headers["x-winnow-accepted"] == "false"
        assert proxy.metric("winnow_rejections_total", route="default", action="best") == 1

    def test_more_are_drawn_up_to_max_candidates(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: Reply(texts=("so",) if received.number < 2 else ("good good",))
        raw = ask(proxy, extra_body={"winnow": {"min_reward": 2, "max_candidates": 20}})
        assert raw.headers["x-winnow-accepted"] == "true"
        assert raw.headers["x-winnow-candidates"] == "s=12;f=0;i=0"
        assert raw.headers["x-winnow-upstream-calls"] == "3"

    def test_drawing_ends_at_max_candidates(self, proxy: RunningProxy) -> None:
        raw = ask(proxy, extra_body={"winnow": {"min_reward": 2, "max_candidates": 6}})
        assert raw.headers["x-winnow-candidates"] == "s=6;f=0;i=0"

    def test_percentiles(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: Reply(texts=("good",))
        assert ask(proxy, extra_body={"winnow": {"min_reward": "p60"}}).headers["x-winnow-accepted"] == "true"
        assert ask(proxy, extra_body={"winnow": {"min_reward": "p70"}}).headers["x-winnow-accepted"] == "false"
        proxy.scorer.has_references = False
        with pytest.raises(openai.BadRequestError, match="no reference completions"):
            ask(proxy, extra_body={"winnow": {"min_reward": "p60"}})

    @pytest.mark.parametrize("stream", [False, True])
    def test_refuse(self, start_proxy: StartProxy, stream: bool) -> None:
        proxy = start_proxy(route={"refusal": "No."})
        proxy.upstream.script = lambda received: Reply(texts=("rejected",))
        raw = ask(proxy, stream=stream, extra_body={"winnow": {"min_reward": 5, "on_reject": "refuse"}})
        assert raw.headers["x-winnow-accepted"] == "false"
        if stream:
            chunks = list(raw.parse())
            assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "No."
            assert chunks[-1].choices[0].finish_reason == "content_filter"
        else:
            answer = raw.parse()
            assert answer.choices[0].message.content == "No."
            assert answer.choices[0].finish_reason == "content_filter"
            assert answer.usage.completion_tokens == 4, "what was generated is billed all the same"

    @pytest.mark.parametrize("stream", [False, True])
    def test_error(self, proxy: RunningProxy, stream: bool) -> None:
        with pytest.raises(openai.UnprocessableEntityError) as caught:
            ask(proxy, stream=stream, extra_body={"winnow": {"min_reward": 5, "on_reject": "error"}})
        assert caught.value.code == "rejected_by_reward_model"

    @pytest.mark.parametrize("stream", [False, True])
    def test_fallback(self, start_proxy: StartProxy, stream: bool) -> None:
        proxy = start_proxy(route={"fallback_model": "big"})
        proxy.upstream.script = lambda received: Reply(texts=("good",) if received.body["model"] == "big" else ("so",))
        raw = ask(proxy, stream=stream, extra_body={"winnow": {"min_reward": 1, "on_reject": "fallback"}})
        assert text_of(raw, stream) == "good"
        assert raw.headers["x-winnow-accepted"] == "true"
        assert raw.headers["x-winnow-candidates"] == "s=8;f=0;i=0"

    def test_nothing_is_asked_of_the_fallback_model_when_the_time_is_up(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(route={"fallback_model": "big"}, upstream={"n_mode": "parallel"})
        proxy.upstream.script = lambda received: Reply(texts=("bad",), hold=received.number == 3)
        floor = {"min_reward": 5, "on_reject": "fallback", "max_candidates": 4, "deadline_s": 2}
        raw = ask(proxy, extra_body={"winnow": floor})
        assert raw.parse().choices[0].message.content == "bad"
        assert {received.body["model"] for received in proxy.upstream.received} == {"m"}
        assert raw.headers["x-winnow-upstream-calls"] == "4"

    def test_how_long_the_fallback_model_takes_teaches_the_route_nothing(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(route={"fallback_model": "big"}, upstream={"n_mode": "parallel"})
        ask(proxy, extra_body={"winnow": {"min_reward": 5, "on_reject": "fallback"}})
        assert len(proxy.upstream.received) == 8
        assert len(proxy.app.live.gateway.histories.durations("default")) == 4

    def test_an_unscored_answer_is_not_rejected(self, proxy: RunningProxy) -> None:
        from reward.errors import ScoringError

        proxy.scorer.failure = ScoringError("broken")
        raw = ask(proxy, extra_body={"winnow": {"min_reward": 5, "on_reject": "error"}})
        assert raw.headers["x-winnow-accepted"] == "false"
        assert raw.headers["x-winnow-scored"] == "false"


class TestAskingForN:
    """One call with `n` where it is honoured; never inferred from one error; no candidate thrown away."""

    def test_honoured(self, proxy: RunningProxy) -> None:
        for _ in range(2):
            assert ask(proxy).headers["x-winnow-upstream-calls"] == "1"
        assert [received.body["n"] for received in proxy.upstream.received] == [4, 4]

    def test_ignored_keeps_the_one_and_draws_the_rest(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: Reply(texts=("a", "b", "good", "d"), honours_n=False)
        first = ask(proxy, extra_body={"winnow": {"return_candidates": True}})
        assert first.headers["x-winnow-upstream-calls"] == "4"
        candidates = first.parse().model_extra["winnow"]["candidates"]
        assert candidates[0]["content"] == "a"
        assert [one["index"] for one in candidates] == [0, 1, 2, 3]
        assert "n" not in proxy.upstream.received[1].body
        ask(proxy)
        assert ["n" in received.body for received in proxy.upstream.received[4:]] == [False] * 4

    def test_rejected_is_learnt_by_comparison(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: (
            error_reply(400, "n_unsupported") if received.body.get("n", 1) > 3 else Reply()
        )
        assert ask(proxy).headers["x-winnow-upstream-calls"] == "5"
        assert ask(proxy).headers["x-winnow-upstream-calls"] == "4"
        smaller = ask(proxy, extra_body={"best_of": 3})
        assert smaller.headers["x-winnow-upstream-calls"] == "1", "a smaller n may be honoured"

    def test_what_becomes_of_the_others_does_not_keep_it_from_being_learnt(self, proxy: RunningProxy) -> None:
        def answer(received: Received) -> Reply:
            if "n" in received.body:
                return error_reply(400, "n_unsupported")
            return error_reply(403) if received.number == 3 else Reply()

        proxy.upstream.script = answer
        assert ask(proxy).headers["x-winnow-candidates"] == "s=3;f=1;i=0"
        assert ask(proxy).headers["x-winnow-upstream-calls"] == "4"

    def test_a_refusal_and_what_follows_it_are_the_upstreams_time(self, proxy: RunningProxy) -> None:
        def answer(received: Received) -> Reply:
            time.sleep(0.6)
            return error_reply(400, "n_unsupported") if "n" in received.body else Reply()

        proxy.upstream.script = answer
        assert float(ask(proxy, extra_body={"best_of": 2}).headers["x-winnow-overhead-ms"]) < 550

    def test_a_hung_first_call_holds_up_none_of_the_others(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: (
            error_reply(400, "n_unsupported") if "n" in received.body else Reply(hold=received.number == 1)
        )
        raw = ask(proxy, extra_body={"winnow": {"deadline_s": 3}})
        assert raw.headers["x-winnow-candidates"] == "s=3;f=1;i=0"

    def test_a_request_that_is_wrong_anyway_teaches_nothing(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: error_reply(400, "bad_request") if received.number < 2 else Reply()
        with pytest.raises(openai.BadRequestError) as caught:
            ask(proxy)
        assert caught.value.code == "bad_request"
        assert ["n" in received.body for received in proxy.upstream.received] == [True, False]
        assert ask(proxy).headers["x-winnow-upstream-calls"] == "1"

    @pytest.mark.parametrize("status", [401, 403, 404, 429, 500, 503])
    def test_other_errors_teach_nothing_and_cost_one_call(self, proxy: RunningProxy, status: int) -> None:
        proxy.upstream.script = lambda received: error_reply(status) if received.number == 0 else Reply()
        with pytest.raises(openai.APIStatusError):
            ask(proxy)
        assert len(proxy.upstream.received) == 1
        assert ask(proxy).headers["x-winnow-upstream-calls"] == "1"

    def test_once_proven_a_400_is_the_requests_own(self, proxy: RunningProxy) -> None:
        ask(proxy)
        proxy.upstream.script = lambda received: error_reply(400)
        with pytest.raises(openai.BadRequestError):
            ask(proxy)
        assert len(proxy.upstream.received) == 2

    def test_forced_parallel(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(upstream={"n_mode": "parallel"})
        assert ask(proxy).headers["x-winnow-upstream-calls"] == "4"
