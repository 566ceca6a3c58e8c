"""`/v1/responses` streamed, through the unmodified `openai` client and on the wire: its typed events."""

from __future__ import annotations

from typing import Any

import openai
import orjson
import pytest

from tests.conftest import RunningProxy, StartProxy
from tests.fakes.upstream import Reply, error_reply
from tests.integration.responses import TEXTS, TOOL, ask, call, graded, text_of


@pytest.fixture(name="graded")
def graded_proxy(proxy: RunningProxy) -> RunningProxy:
    return graded(proxy)


class TestStreams:
    def test_the_winners_own_events(self, graded: RunningProxy) -> None:
        raw = ask(graded, stream=True)
        events = list(raw.parse())
        assert [event.type for event in events] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
            "response.output_text.delta",
            "response.output_text.delta",
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert [event.sequence_number for event in events] == list(range(10))
        assert len({event.response.id for event in events if hasattr(event, "response")}) == 1
        assert "".join(event.delta for event in events if event.type.endswith("text.delta")) == "good good"
        assert events[-1].response.usage.output_tokens == 6, "of all candidates"
        assert float(raw.headers["x-winnow-reward"]) == 2
        assert graded.upstream.store.responses == {}

    def test_on_the_wire(self, graded: RunningProxy) -> None:
        raw = graded.client.responses.with_streaming_response.create(model="m", input="x", stream=True)
        with raw as response:
            assert response.headers["content-type"].startswith("text/event-stream")
            blocks = response.read().decode().strip().split("\n\n")
        for block in blocks:
            name, data = block.split("\n")
            assert name.removeprefix("event: ") == orjson.loads(data.removeprefix("data: "))["type"]
        assert "[DONE]" not in blocks[-1]

    def test_helper(self, graded: RunningProxy) -> None:
        with graded.client.responses.stream(model="m", input="x") as stream:
            kinds = [event.type for event in stream]
            assert stream.get_final_response().output_text == "good good"
        assert kinds[-1] == "response.completed"

    def test_return_candidates_in_the_last_event(self, graded: RunningProxy) -> None:
        raw = ask(graded, stream=True, extra_body={"winnow": {"return_candidates": True}})
        *earlier, last = list(raw.parse())
        winnow = last.response.model_extra["winnow"]
        assert sorted(one["content"] for one in winnow["candidates"]) == sorted(TEXTS)
        assert not any("winnow" in (getattr(event, "response", None) or last).model_extra for event in earlier[:2])

    def test_an_upstream_that_does_not_stream(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: Reply(texts=TEXTS, streams=False)
        streamed = list(ask(proxy, stream=True).parse())
        proxy.upstream.script = lambda received: Reply(texts=TEXTS)
        assert [event.sequence_number for event in streamed] == list(range(len(streamed)))
        with proxy.client.responses.stream(model="m", input="x") as helper:
            kinds = [event.type for event in helper if event.type != "response.output_text.delta"]
        assert [event.type for event in streamed if event.type != "response.output_text.delta"] == kinds
        assert streamed[-1].response.output_text == "good good"

    def test_calls_of_an_upstream_that_does_not_stream(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: Reply(choice=call("look", '{"x": 1}'), streams=False)
        with proxy.client.responses.stream(model="m", input="x", tools=[TOOL]) as helper:
            kinds = [event.type for event in helper]
            assert helper.get_final_response().output[0].arguments == '{"x": 1}'
        assert "response.function_call_arguments.done" in kinds

    def test_a_broken_candidate_loses(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: Reply(texts=("good",), cut_after=5 if received.number else None)
        raw = ask(proxy, stream=True)
        assert raw.headers["x-winnow-candidates"] == "s=1;f=3;i=0"
        assert text_of(raw, True) == "good"

    def test_all_broken_is_an_error(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: Reply(cut_after=5)
        with pytest.raises(openai.InternalServerError) as caught:
            ask(proxy, stream=True)
        assert caught.value.code == "upstream_broken"

    def test_errors_keep_their_status_before_the_first_byte(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: error_reply(429, "slow_down", retry_after="7")
        with pytest.raises(openai.RateLimitError) as caught:
            ask(proxy, stream=True)
        assert caught.value.code == "slow_down"

    def test_an_error_after_a_sign_of_life_is_a_flat_event(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(server={"first_keepalive_s": 0.05})
        proxy.upstream.script = lambda received: Reply(hold=True, raw=error_reply(500).raw, status=500)
        asked = {"model": "m", "input": "x", "stream": True}
        with proxy.client.responses.with_streaming_response.create(**asked) as response:
            lines = response.iter_lines()
            assert next(lines) == ": keepalive"
            proxy.upstream.release()
            rest = [line for line in lines if line and not line.startswith(":")]
        assert rest[0] == "event: error"
        event = orjson.loads(rest[1].removeprefix("data: "))
        assert {"type", "code", "message", "param", "sequence_number"} <= event.keys()
        assert (event["type"], event["sequence_number"], len(rest)) == ("error", 0, 2)
        proxy.upstream.script = lambda received: error_reply(500)

    def test_a_relayed_stream_that_breaks_goes_on_counting(self, proxy: RunningProxy) -> None:
        proxy.upstream.script = lambda received: Reply(cut_after=5)
        asked: dict[str, Any] = {"model": "m@1", "input": "x", "stream": True}
        with proxy.client.responses.with_streaming_response.create(**asked) as response:
            lines = [line for line in response.iter_lines() if line]
        assert lines[-2] == "event: error"
        event = orjson.loads(lines[-1].removeprefix("data: "))
        assert (event["sequence_number"], event["code"]) == (5, "upstream_broken")

    def test_a_loop_over_a_failed_stream_raises(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(server={"first_keepalive_s": 0.05})
        proxy.upstream.script = lambda received: Reply(hold=True, raw=error_reply(500).raw, status=500)
        stream = ask(proxy, stream=True).parse()
        proxy.upstream.release()
        with pytest.raises(openai.APIError, match="scripted 500"):
            list(stream)
