from typing import Any

import orjson
import pytest

from proxy.upstreams.local_requests import GenerationRequest, RequestError, SamplingParams, parse_chat, parse_completion

HELLO = [{"role": "user", "content": "hello"}]


def chat(**members: Any) -> GenerationRequest:
    return parse_chat(orjson.dumps({"messages": HELLO, **members}))


def completion(**members: Any) -> GenerationRequest:
    return parse_completion(orjson.dumps({"prompt": "hello", **members}))


def test_defaults_are_openais() -> None:
    request = chat()
    assert request.sampling == SamplingParams()
    assert (request.n, request.max_tokens, request.stream, request.model) == (1, None, False, None)
    assert completion().max_tokens == 16


def test_explicit_nulls_are_absent() -> None:
    names = (
        "n temperature top_p presence_penalty frequency_penalty logit_bias seed stop max_tokens stream stream_options "
        "logprobs top_logprobs max_completion_tokens tool_choice model"
    )
    assert chat(**dict.fromkeys(names.split())) == chat()
    assert completion(suffix=None, echo=None, logprobs=None, seed=None) == completion()


def test_unknown_and_harmless_fields_are_ignored() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    extras = {"tools": tools, "tool_choice": "auto", "response_format": {"type": "json_object"}, "user": "u", "x": 1}
    assert chat(**extras) == chat()


def test_max_completion_tokens_wins() -> None:
    assert chat(max_tokens=5, max_completion_tokens=7).max_tokens == 7


def test_messages_become_plain_text() -> None:
    request = chat(
        messages=[
            {"role": "developer", "content": "be brief"},
            {
                "role": "user",
                "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}],
                "name": "x",
            },
            {"role": "assistant", "content": None, "tool_calls": [], "refusal": None, "annotations": []},
        ]
    )
    assert request.messages == (
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "one\ntwo"},
        {"role": "assistant", "content": ""},
    )


def test_logprobs_in_both_dialects() -> None:
    assert chat(logprobs=True).sampling.top_logprobs == 0
    assert chat(logprobs=True, top_logprobs=20).sampling.top_logprobs == 20
    assert chat(logprobs=False).sampling.top_logprobs is None
    assert completion(logprobs=0).sampling.top_logprobs == 0


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [("a", ("a",)), (["a", "b"], ("a", "b")), ([1, 2], ((1, 2),)), ([[1], [2, 3]], ((1,), (2, 3)))],
)
def test_prompts_have_four_shapes(prompt: Any, expected: object) -> None:
    assert completion(prompt=prompt).prompts == expected


@pytest.mark.parametrize(("stop", "expected"), [("a", ("a",)), (["a", "b"], ("a", "b")), ([], ()), (None, ())])
def test_stops_are_one_or_several(stop: Any, expected: object) -> None:
    assert chat(stop=stop).sampling.stop == expected


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"frequency_penalty": -3}, "frequency_penalty"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": 1.5}, "n"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"seed": 2**63}, "seed"),
        ({"seed": "x"}, "seed"),
        ({"stop": 1}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": list("abcde")}, "stop"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": []}, "logit_bias"),
        ({"stream": "yes"}, "stream"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": 2}, "logprobs"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "f"}}}, "tool_choice"),
        ({"messages": []}, "messages"),
        ({"messages": "hello"}, "messages"),
        ({"messages": ["hello"]}, "messages[0]"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 7}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages[0].content[0]"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, "messages[0].content[0]"),
    ],
)
def test_bad_chat_requests_name_the_field(members: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        chat(**members)
    assert caught.value.param == param
    assert caught.value.status == 400
    assert param in caught.value.message


@pytest.mark.parametrize(
    ("members", "param"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": ["a"] * 9, "n": 128}, "prompt"),
        ({"suffix": "end"}, "suffix"),
        ({"logprobs": 6}, "logprobs"),
        ({"logprobs": True}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
    ],
)
def test_bad_completion_requests_name_the_field(members: dict[str, Any], param: str) -> None:
    with pytest.raises(RequestError) as caught:
        completion(**members)
    assert caught.value.param == param


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b'{"messages": NaN}', b'"text"', b'{"prompt": "\\ud800"}'])
def test_bodies_that_are_no_json_object_are_refused(body: bytes) -> None:
    with pytest.raises(RequestError):
        parse_chat(body)


def test_a_missing_field_is_named() -> None:
    with pytest.raises(RequestError, match="Missing required parameter: 'messages'"):
        parse_chat(b"{}")
