"""Whatever a client sends is understood or refused by name; nothing else happens."""

from __future__ import annotations

from typing import Any

import orjson
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from proxy.candidates import Endpoint
from proxy.config import RouteSettings
from proxy.errors import BadRequestError
from proxy.request import Ask, parse_ask, parse_object
from proxy.routing import ModelName

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**53), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=8,
)  # fmt: skip
FIELDS = (
    "model", "messages", "prompt", "n", "best_of", "stream", "stream_options", "temperature", "seed", "echo",
    "max_tokens", "winnow", "tools", "response_format", "input", "instructions", "store", "background", "conversation",
    "previous_response_id",
)  # fmt: skip
MESSAGES = [{"role": "user", "content": "x"}]


def parse_raw(endpoint: Endpoint, raw: bytes, headers: dict[str, str] | None = None, **route: Any) -> Ask:
    return parse_ask(endpoint, raw, parse_object(raw), headers or {}, RouteSettings(**route), ModelName())


def parse(body: dict[str, Any], headers: dict[str, str] | None = None, **route: Any) -> Ask:
    return parse_raw("chat", orjson.dumps({"messages": MESSAGES} | body), headers, **route)


@given(st.dictionaries(st.sampled_from(FIELDS), JSON), st.sampled_from(["chat", "completions", "responses"]))
def test_any_json_is_understood_or_refused(body: dict[str, Any], endpoint: Any) -> None:
    try:
        ask = parse_raw(endpoint, orjson.dumps(body))
    except BadRequestError as error:
        assert str(error)
    else:
        assert 1 <= ask.n <= ask.best_of or ask.passes_through
        assert not {"winnow", "best_of"} & set(ask.body)


@given(st.binary())
def test_any_bytes_are_understood_or_refused(raw: bytes) -> None:
    with pytest.raises(BadRequestError):
        parse_raw("chat", raw)


@example("0\x1f", "")
@given(st.text(max_size=20), st.text(max_size=20))
def test_headers_never_crash(best_of: str, timeout: str) -> None:
    headers = {"x-winnow-best-of": best_of, "x-stainless-read-timeout": timeout}
    try:
        parse({}, headers)
    except BadRequestError as error:
        assert error.param in ("x-winnow-best-of", "best_of")


def test_a_body_that_asks_nothing_of_us_stays_as_it_is() -> None:
    raw = b'{ "messages" : [] }'
    ask = parse_raw("chat", raw, best_of=1)
    assert ask.passes_through and ask.encoded() is raw


@pytest.mark.parametrize(
    ("body", "headers", "route", "expected"),
    [
        ({}, {}, {}, None),
        ({}, {}, {"deadline_s": 9}, 9),
        ({}, {"x-stainless-read-timeout": "600"}, {}, 598),
        ({}, {"x-stainless-read-timeout": "10.0"}, {"deadline_s": 9}, 8),
        ({}, {"x-stainless-read-timeout": "1"}, {}, 0.5),
        ({}, {"x-stainless-timeout": "60"}, {}, 58),
        ({}, {"x-stainless-read-timeout": "nan"}, {}, None),
        ({"winnow": {"deadline_s": 3}}, {"x-stainless-read-timeout": "600"}, {"deadline_s": 1}, 3),
    ],
)
def test_deadlines(
    body: dict[str, Any], headers: dict[str, str], route: dict[str, Any], expected: float | None
) -> None:
    assert parse(body, headers, **route).deadline_s == expected


def test_plain_n_on_a_server_that_draws_no_more_is_left_to_the_client() -> None:
    assert parse({"n": 3}, best_of=1).passes_through
    assert not parse({"n": 3}, best_of=4).passes_through
    assert not parse({"n": 3, "best_of": 3}, best_of=1).passes_through


def test_too_many_draws_over_all_prompts() -> None:
    body = orjson.dumps({"prompt": ["p"] * 65, "best_of": 4})
    with pytest.raises(BadRequestError, match="65 prompts"):
        parse_raw("completions", body)
