"""`/v1/responses` through the unmodified `openai` client: best of N, and no trace of losers."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from pydantic import BaseModel

from tests.conftest import RunningProxy, StartProxy
from tests.fakes.upstream import Reply, error_reply
from tests.integration.responses import TOOL, ask, bodies, call, final, graded, text_of


@pytest.fixture(name="graded")
def graded_proxy(proxy: RunningProxy) -> RunningProxy:
    return graded(proxy)


def test_the_best_candidate_comes_back_as_the_upstream_sent_it(graded: RunningProxy) -> None:
    raw = ask(graded)
    answer = raw.parse()
    assert answer.output_text == "good good"
    assert (answer.id, answer.status, answer.object) == ("resp_1", "completed", "response")
    assert raw.headers["x-winnow-candidates"] == "s=4;f=0;i=0"
    assert raw.headers["x-winnow-upstream-calls"] == "4"
    assert float(raw.headers["x-winnow-reward"]) == 2
    assert "x-winnow-held-by" not in raw.headers
    assert answer.usage.input_tokens == 28 and answer.usage.output_tokens == 6 and answer.usage.total_tokens == 34
    assert answer.usage.input_tokens_details.cached_tokens == 12
    assert graded.metric("winnow_requests_total", route="default", endpoint="responses", status="200") == 1
    assert graded.metric("winnow_tokens_total", route="default", kind="completion") == 6


def test_losers_leave_no_trace(graded: RunningProxy) -> None:
    answer = ask(graded).parse()
    assert [body["store"] for body in bodies(graded)] == [False] * 4
    assert graded.upstream.store.responses == {}
    assert answer.store is False, "and the client is told"


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"store": True}, "store"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"conversation": "conv_1", "store": False}, "conversation"),
        ({"background": True, "store": False}, "background"),
        ({"previous_response_id": "resp_0"}, "previous_response_id"),
        ({"tools": [{"type": "web_search"}], "store": False}, "hosted_tools"),
        ({"tools": [TOOL, {"type": "mcp", "server_label": "s", "server_url": "http://s"}]}, "hosted_tools"),
        ({"input": openai.NOT_GIVEN, "prompt": {"id": "pmpt_1"}}, "input"),
        ({"input": [{"type": "item_reference", "id": "msg_1"}]}, "input"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_what_needs_state_is_one_call_untouched(
    graded: RunningProxy, asked: dict[str, Any], why: str, stream: bool
) -> None:
    raw = ask(graded, **asked, stream=stream, extra_body={"best_of": 4})
    assert raw.headers["x-winnow-best-of"] == "1"
    assert raw.headers["x-winnow-held-by"] == why
    (body,) = bodies(graded)
    assert {key: body[key] for key in asked if key in body} == {k: v for k, v in asked.items() if k in body}
    assert ("store" in body) == ("store" in asked)


def test_a_turn_is_added_to_a_conversation_once(graded: RunningProxy) -> None:
    ask(graded, conversation="conv_1")
    assert graded.upstream.store.conversations == {"conv_1": ["resp_0"]}
    assert list(graded.upstream.store.responses) == ["resp_0"]


@pytest.mark.parametrize("winnow", [{}, {"return_candidates": True}])
def test_what_leaves_traces_is_tried_once(start_proxy: StartProxy, winnow: dict[str, Any]) -> None:
    proxy = start_proxy(route={"max_retries": 2})
    proxy.upstream.script = lambda received: error_reply(503, retry_after_ms="1")
    with pytest.raises(openai.InternalServerError):
        ask(proxy, model="m@1", store=False)
    assert len(proxy.upstream.received) == 3
    with pytest.raises(openai.InternalServerError) as caught:
        ask(proxy, conversation="conv_1", extra_body={"winnow": winnow})
    assert len(proxy.upstream.received) == 4
    assert caught.value.response.headers.get("x-should-retry") != "false", "the client may"


def test_what_continues_without_storing_is_drawn(graded: RunningProxy) -> None:
    raw = ask(graded, previous_response_id="resp_0", store=False)
    assert raw.headers["x-winnow-best-of"] == "4"
    assert {body["previous_response_id"] for body in bodies(graded)} == {"resp_0"}
    assert graded.upstream.store.responses == {}


def test_the_operator_may_leave_storing_to_the_upstream(start_proxy: StartProxy) -> None:
    proxy = start_proxy(route={"responses_store": "pass"})
    raw = ask(proxy)
    assert raw.headers["x-winnow-held-by"] == "store"
    assert list(proxy.upstream.store.responses) == [raw.parse().id]
    assert ask(proxy, store=False).headers["x-winnow-best-of"] == "4"


def test_stored_responses_pass_through(graded: RunningProxy) -> None:
    stored = ask(graded, store=True).parse()
    assert graded.client.responses.retrieve(stored.id).output_text == stored.output_text
    graded.client.responses.delete(stored.id)
    with pytest.raises(openai.NotFoundError, match="not found"):
        graded.client.responses.retrieve(stored.id)


def test_one_stored_answer_is_still_judged(start_proxy: StartProxy) -> None:
    """A floor under the reward is no less wanted where only one call may be made."""
    proxy = start_proxy(route={"min_reward": 1.0, "on_reject": "refuse", "refusal": "No.", "max_candidates": 9})
    proxy.upstream.script = lambda received: Reply(texts=("bad",))
    raw = ask(proxy, store=True)
    assert raw.parse().output_text == "No."
    assert raw.headers["x-winnow-accepted"] == "false"
    assert raw.headers["x-winnow-held-by"] == "store"
    assert [body["store"] for body in bodies(proxy)] == [True], "one call, as the client meant it"


def test_best_of_1_is_relayed_as_it_came(graded: RunningProxy) -> None:
    raw = ask(graded, model="m@1")
    assert raw.headers["x-winnow-best-of"] == "1"
    assert "x-winnow-held-by" not in raw.headers
    assert bodies(graded) == [{"model": "m", "input": "Say something."}]


def test_items_become_messages_for_the_reward_model(graded: RunningProxy) -> None:
    image = {"type": "input_image", "image_url": "u"}
    items = [
        {"role": "developer", "content": "Rules."},
        {"role": "user", "content": [{"type": "input_text", "text": "Look."}, image]},
        {"type": "reasoning", "id": "rs_1", "summary": []},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "I will."}]},
        {"type": "function_call", "call_id": "c1", "name": "look", "arguments": '{"x": 1}'},
        {"type": "function_call", "call_id": "c2", "name": "look", "arguments": '{"x": 2}'},
        {"type": "function_call_output", "call_id": "c1", "output": "a cat"},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "a dog"}]},
    ]  # fmt: skip
    ask(graded, instructions="Be brief.", input=items)
    messages, _ = graded.scorer.scored[0]

    def function(id_: str, x: int) -> dict[str, Any]:
        return {"id": id_, "type": "function", "function": {"name": "look", "arguments": f'{{"x": {x}}}'}}

    assert messages == [
        {"role": "system", "content": "Be brief."},
        {"role": "developer", "content": "Rules."},
        {"role": "user", "content": [{"type": "text", "text": "Look."}, image]},
        {
            "role": "assistant",
            "content": [{"type": "text", "text": "I will."}],
            "tool_calls": [function("c1", 1), function("c2", 2)],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "a cat"},
        {"role": "tool", "tool_call_id": "c2", "content": [{"type": "text", "text": "a dog"}]},
    ]
    assert bodies(graded)[0]["input"] == items, "the upstream gets them as they came"


@pytest.mark.parametrize("stream", [False, True])
class TestValidity:
    def test_structured_output(self, proxy: RunningProxy, stream: bool) -> None:
        class Answer(BaseModel):
            x: int

        proxy.upstream.script = lambda received: Reply(texts=("good good", '{"x": "good"}', '{"x": 1}', ""))
        if stream:
            with proxy.client.responses.stream(model="m", input="?", text_format=Answer) as events:
                parsed = events.get_final_response().output_parsed
        else:
            parsed = proxy.client.responses.parse(model="m", input="?", text_format=Answer).output_parsed
        assert parsed == Answer(x=1)

    def test_json_object(self, proxy: RunningProxy, stream: bool) -> None:
        proxy.upstream.script = lambda received: Reply(texts=("good", "[1]", "{}", "so"))
        raw = ask(proxy, text={"format": {"type": "json_object"}}, stream=stream)
        assert text_of(raw, stream) == "{}"
        assert raw.headers["x-winnow-candidates"] == "s=1;f=0;i=3"

    def test_tool_arguments(self, proxy: RunningProxy, stream: bool) -> None:
        calls = (call("look", "{"), call("look", '{"x": "1"}'), call("look", '{"x": 1}'), call("other", "{}"))
        proxy.upstream.script = lambda received: Reply(choice=calls[received.number])
        raw = ask(proxy, tools=[TOOL], tool_choice="required", stream=stream)
        assert raw.headers["x-winnow-candidates"] == "s=1;f=0;i=3"
        answer = final(raw) if stream else raw.parse()
        assert [item.arguments for item in answer.output] == ['{"x": 1}']

    def test_a_named_tool(self, proxy: RunningProxy, stream: bool) -> None:
        proxy.upstream.script = lambda received: Reply(
            texts=("good good",), choice=call("look", '{"x": 2}') if received.number == 3 else {}
        )
        raw = ask(proxy, tools=[TOOL], tool_choice={"type": "function", "name": "look"}, stream=stream)
        assert raw.headers["x-winnow-candidates"] == "s=1;f=0;i=3"

    def test_filtered_failed_and_empty_lose(self, proxy: RunningProxy, stream: bool) -> None:
        replies = {
            0: Reply(texts=("good good",), choice={"finish_reason": "content_filter"}),
            1: Reply(texts=("good",), response={"status": "failed", "error": {"code": "server_error", "message": "m"}}),
            2: Reply(texts=("",)),
            3: Reply(texts=("bad",)),
        }
        proxy.upstream.script = lambda received: replies[received.number]
        raw = ask(proxy, stream=stream)
        assert text_of(raw, stream) == "bad"
        assert raw.headers["x-winnow-candidates"] == "s=1;f=1;i=2"

    def test_cut_off_answers_pay_a_penalty(self, proxy: RunningProxy, stream: bool) -> None:
        proxy.upstream.script = lambda received: Reply(
            texts=("good", "bad"), choice={"finish_reason": "stop" if received.number else "length"}
        )
        raw = ask(proxy, stream=stream)
        assert (final(raw) if stream else raw.parse()).status == "completed"

    def test_a_refusal_is_valid(self, proxy: RunningProxy, stream: bool) -> None:
        message = {"role": "assistant", "content": None, "refusal": "I would rather not."}
        proxy.upstream.script = lambda received: Reply(choice={"message": message})
        raw = ask(proxy, text={"format": {"type": "json_object"}}, stream=stream)
        assert raw.headers["x-winnow-accepted"] == "true"
        answer = final(raw) if stream else raw.parse()
        assert answer.output[0].content[0].refusal == "I would rather not."

    def test_a_schema_that_is_none(self, proxy: RunningProxy, stream: bool) -> None:
        asked = {"format": {"type": "json_schema", "name": "s", "schema": {"type": 5}}}
        with pytest.raises(openai.BadRequestError, match=r"text\.format\.schema") as caught:
            ask(proxy, text=asked, stream=stream)
        assert caught.value.param == "text.format.schema"


@pytest.mark.parametrize("stream", [False, True])
def test_refuse(start_proxy: StartProxy, stream: bool) -> None:
    proxy = start_proxy(route={"refusal": "No."})
    proxy.upstream.script = lambda received: Reply(texts=("rejected words",))
    raw = ask(proxy, stream=stream, extra_body={"winnow": {"min_reward": 5, "on_reject": "refuse"}})
    answer = final(raw) if stream else raw.parse()
    assert answer.output_text == "No."
    assert answer.status == "incomplete" and answer.incomplete_details.reason == "content_filter"
    assert answer.usage.output_tokens == 8, "what was generated is billed all the same"
    assert "rejected" not in answer.to_json()


def test_explicit_nulls_are_accepted(graded: RunningProxy) -> None:
    names = (
        "instructions", "store", "background", "conversation", "previous_response_id", "tools", "tool_choice", "text",
        "stream", "temperature", "n", "best_of", "winnow", "prompt", "include", "reasoning", "max_output_tokens",
    )  # fmt: skip
    assert ask(graded, extra_body=dict.fromkeys(names)).parse().output_text == "good good"


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"n": 2}, "n"),
        ({"input": 5}, "input"),
        ({"input": ["x"]}, "input[0]"),
        ({"input": [{"type": "message", "content": "x"}]}, "input[0]"),
        ({"input": [{"role": "user", "content": 5}]}, "input[0].content"),
        ({"store": "yes"}, "store"),
        ({"previous_response_id": 5}, "previous_response_id"),
    ],
)
def test_bad_requests_name_the_field(graded: RunningProxy, asked: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        ask(graded, extra_body=asked)
    assert caught.value.param == param
    assert not graded.upstream.received


def test_temperature_0_is_one_call_that_may_be_stored(graded: RunningProxy) -> None:
    ask(graded, temperature=0)
    (body,) = bodies(graded)
    assert "store" not in body
