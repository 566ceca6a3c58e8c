"""The unmodified `openai` client against a running proxy: what must work by changing nothing but `base_url`."""

from __future__ import annotations

import openai
import pytest

from tests.conftest import RunningProxy, StartProxy
from tests.fakes.upstream import Reply

TEXTS = ("bad", "good good", "so so", "good")
MESSAGES = [{"role": "user", "content": "Say something."}]


@pytest.fixture
def graded(proxy: RunningProxy) -> RunningProxy:
    """Its upstream answers with texts of different reward."""
    proxy.upstream.script = lambda received: Reply(texts=TEXTS)
    return proxy


def test_chat_returns_the_best_candidate(graded: RunningProxy) -> None:
    raw = graded.client.chat.completions.with_raw_response.create(model="m", messages=MESSAGES)
    answer = raw.parse()
    assert [choice.message.content for choice in answer.choices] == ["good good"]
    assert answer.choices[0].index == 0
    assert answer.id == "chatcmpl-0" and answer.system_fingerprint == "fp_fake"
    assert raw.headers["x-winnow-candidates"] == "s=4;f=0;i=0"
    assert float(raw.headers["x-winnow-reward"]) == 2
    assert raw.headers["x-winnow-best-of"] == "4"
    assert raw.headers["x-winnow-strategy"] == "best_of_n"
    assert raw.headers["x-winnow-accepted"] == "true"
    assert raw.headers["x-winnow-upstream-calls"] == "1"
    assert raw.headers["x-winnow-completion-id"]
    assert raw.headers["x-winnow-upstream-request-id"] == "up-plain"
    assert answer._request_id == raw.headers["x-request-id"]
    assert float(raw.headers["x-winnow-overhead-ms"]) >= 0


async def test_async_chat(graded: RunningProxy) -> None:
    async with openai.AsyncOpenAI(base_url=f"{graded.url}/v1", api_key="k") as client:
        answer = await client.chat.completions.create(model="m", messages=MESSAGES)
    assert answer.choices[0].message.content == "good good"


def test_streamed_chat_replays_the_winner(graded: RunningProxy) -> None:
    with graded.client.chat.completions.create(model="m", messages=MESSAGES, stream=True) as stream:
        chunks = list(stream)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "good good"
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert len({chunk.id for chunk in chunks}) == 1
    assert len(chunks) == 4, "role, two words, finish: as the upstream cut them"
    assert len(graded.upstream.received) == 4


async def test_streamed_async_chat(graded: RunningProxy) -> None:
    async with openai.AsyncOpenAI(base_url=f"{graded.url}/v1", api_key="k") as client:
        stream = await client.chat.completions.create(model="m", messages=MESSAGES, stream=True)
        assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == "good good"


def test_stream_headers_carry_the_verdict(graded: RunningProxy) -> None:
    with graded.client.chat.completions.with_streaming_response.create(
        model="m", messages=MESSAGES, stream=True
    ) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert float(response.headers["x-winnow-reward"]) == 2
        assert response.headers["x-winnow-upstream-calls"] == "4"
        assert response.headers["x-request-id"]
        response.read()


def test_legacy_completion_best_of_4_n_2(graded: RunningProxy) -> None:
    answer = graded.client.completions.create(model="m", prompt="Say", best_of=4, n=2)
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "good good"), (1, "good")]
    assert answer.usage and answer.usage.completion_tokens == 6
    assert graded.scorer.scored[0][0] == [{"role": "user", "content": "Say"}]


def test_legacy_completion_of_several_prompts(graded: RunningProxy) -> None:
    answer = graded.client.completions.create(model="m", prompt=["One", "Two"], best_of=4, n=2)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in answer.choices] == ["good good", "good"] * 2
    assert answer.usage and answer.usage.prompt_tokens == 14
    assert sorted(received.body["prompt"] for received in graded.upstream.received) == ["One", "Two"]


def test_streamed_legacy_completion(graded: RunningProxy) -> None:
    with graded.client.completions.create(model="m", prompt="Say", best_of=4, stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "good good"


def test_models_and_embeddings_pass_through(proxy: RunningProxy) -> None:
    assert [model.id for model in proxy.client.models.list()] == ["fake-model"]
    assert proxy.client.embeddings.create(model="e", input="text").data[0].embedding == [0.5, -0.25]
    assert proxy.upstream.others[0].headers["authorization"] == "Bearer client-key"


def test_return_candidates(graded: RunningProxy) -> None:
    answer = graded.client.chat.completions.create(
        model="m", messages=MESSAGES, extra_body={"winnow": {"return_candidates": True}}
    )
    winnow = answer.model_extra["winnow"]
    candidates = winnow["candidates"]
    assert [one["content"] for one in candidates] == list(TEXTS)
    assert [one["index"] for one in candidates] == [0, 1, 2, 3]
    best = max((one for one in candidates if one["valid"]), key=lambda one: one["reward"])
    assert best["index"] == winnow["winner"]
    assert best["content"] == answer.choices[0].message.content
    assert best["percentile"] == 70
    assert winnow["reward_model"] == "fake"
    assert "winnow" not in graded.upstream.received[0].body


def test_the_query_string_reaches_the_upstream_with_every_candidate(graded: RunningProxy) -> None:
    """Some providers name their API's version there."""
    client = graded.client.with_options(default_query={"api-version": "2026-01"})
    client.chat.completions.create(model="m", messages=MESSAGES)
    assert {seen.query for seen in graded.upstream.received} == {"api-version=2026-01"}


def test_return_candidates_streamed(graded: RunningProxy) -> None:
    with graded.client.chat.completions.create(
        model="m", messages=MESSAGES, stream=True, extra_body={"winnow": {"return_candidates": True}}
    ) as stream:
        *content, last = list(stream)
    assert all(chunk.choices for chunk in content)
    assert last.choices == []
    assert sorted(one["content"] for one in last.model_extra["winnow"]["candidates"]) == sorted(TEXTS)
    assert all(one["usage"]["prompt_tokens"] == 7 for one in last.model_extra["winnow"]["candidates"])


def test_n_returns_the_k_best_streamed(graded: RunningProxy) -> None:
    with graded.client.chat.completions.create(model="m", messages=MESSAGES, n=2, stream=True) as stream:
        texts = {0: "", 1: ""}
        for chunk in stream:
            texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == {0: "good good", 1: "good"}


@pytest.mark.parametrize("stream_options", [{"include_usage": True}, None])
def test_include_usage_is_honoured_exactly(graded: RunningProxy, stream_options: dict[str, bool] | None) -> None:
    asked = {} if stream_options is None else {"stream_options": stream_options}
    with graded.client.chat.completions.create(model="m", messages=MESSAGES, stream=True, **asked) as stream:
        chunks = list(stream)
    with_usage = [chunk for chunk in chunks if chunk.usage is not None]
    if stream_options is None:
        assert not with_usage
        assert all(chunk.choices for chunk in chunks)
    else:
        assert with_usage == chunks[-1:]
        assert chunks[-1].choices == []
        assert chunks[-1].usage.prompt_tokens == 4 * 7
        assert chunks[-1].usage.completion_tokens == 6
        assert chunks[-1].usage.prompt_tokens_details.cached_tokens == 12


def test_usage_is_the_sum_of_all_that_was_generated(graded: RunningProxy) -> None:
    one_call = graded.client.chat.completions.create(model="m", messages=MESSAGES)
    assert one_call.usage.completion_tokens == 6 and one_call.usage.prompt_tokens == 7
    four_calls = graded.client.chat.completions.create(model="m", messages=MESSAGES, seed=5)
    assert four_calls.usage.completion_tokens == 6 and four_calls.usage.prompt_tokens == 28
    assert four_calls.usage.total_tokens == 34


def test_seed_counts_up_over_candidates(graded: RunningProxy) -> None:
    graded.client.chat.completions.create(model="m", messages=MESSAGES, seed=5)
    assert sorted(received.body["seed"] for received in graded.upstream.received) == [5, 6, 7, 8]


@pytest.mark.parametrize(
    ("model", "kwargs", "expected"),
    [
        ("m@3", {}, 3),
        ("m@3", {"extra_headers": {"x-winnow-best-of": "2"}}, 2),
        ("m@3", {"extra_body": {"best_of": 5}}, 5),
        ("m", {"extra_body": {"winnow": {"best_of": 6}}}, 6),
        ("m", {"extra_headers": {"x-winnow-best-of": "7"}, "extra_body": {"best_of": 2}}, 2),
        ("m", {"n": 6}, 6),
        ("m", {"temperature": 0}, 1),
        ("m@1", {}, 1),
    ],
)
def test_best_of_is_resolved_in_order(graded: RunningProxy, model: str, kwargs: dict, expected: int) -> None:
    raw = graded.client.chat.completions.with_raw_response.create(model=model, messages=MESSAGES, **kwargs)
    assert raw.headers["x-winnow-best-of"] == str(expected)
    assert raw.parse().model == "m"
    sent = graded.upstream.received[0].body
    assert sent["model"] == "m" and "best_of" not in sent and "winnow" not in sent


def test_long_numbers_after_an_at_sign_are_part_of_the_name(graded: RunningProxy) -> None:
    graded.client.chat.completions.create(model="m@20240620", messages=MESSAGES)
    assert graded.upstream.received[0].body["model"] == "m@20240620"


def test_unknown_fields_reach_the_upstream_untouched(graded: RunningProxy) -> None:
    odd = {"vendor": {"x": [1, None, 1.5]}, "user": None, "metadata": {"a": "b"}, "stop": ["x"], "logit_bias": None}
    graded.client.chat.completions.create(model="m", messages=MESSAGES, extra_body=odd)
    sent = graded.upstream.received[0].body
    assert {key: sent[key] for key in odd} == odd
    assert sent["n"] == 4


def test_explicit_nulls_are_accepted(graded: RunningProxy) -> None:
    nulls = dict.fromkeys(("n", "best_of", "stream", "seed", "temperature", "stream_options", "winnow", "max_tokens"))
    answer = graded.client.chat.completions.create(model="m", messages=MESSAGES, extra_body=nulls)
    assert answer.choices[0].message.content == "good good"


def test_more_candidates_never_lower_the_reward(start_proxy: StartProxy) -> None:
    proxy = start_proxy()
    proxy.upstream.script = lambda received: Reply(texts=TEXTS)
    rewards = []
    for best_of in (1, 2, 4, 8):
        winnow = {"best_of": best_of, "return_candidates": True}
        answer = proxy.client.chat.completions.create(model="m", messages=MESSAGES, extra_body={"winnow": winnow})
        rewards.append(max(one["reward"] for one in answer.model_extra["winnow"]["candidates"]))
    assert rewards == sorted(rewards)
