"""Error answers of all kinds of servers, in the one shape that clients read."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.upstreams.error_bodies import in_shape, redacted


def test_a_whole_envelope_stays_as_it_is() -> None:
    body = b'{"error":  {"message":"m","type":"t","param":null,"code":"c"}, "extra": 1}'
    assert in_shape(body) is body


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({"error": {"code": 503, "message": "wait", "type": "unavailable"}}, ("wait", "unavailable", None, "503")),
        ({"error": {"message": "m", "code": 1.5, "param": ["a"]}}, ("m", "upstream_error", '["a"]', "1.5")),
        ({"error": "text"}, ("text", "upstream_error", None, None)),
        ({"message": "old", "type": "Bad", "object": "error", "code": 400}, ("old", "Bad", None, "400")),
        ({"detail": "Not Found"}, ("Not Found", "upstream_error", None, None)),
        ({"detail": [{"loc": ["body"]}]}, ('[{"loc":["body"]}]', "upstream_error", None, None)),
        ({"error": {}}, ("", "upstream_error", None, None)),
    ],
)  # fmt: skip
def test_others_are_brought_into_it(body: object, error: tuple[str | None, ...]) -> None:
    shaped = in_shape(json.dumps(body).encode())
    assert shaped is not None
    found = json.loads(shaped)["error"]
    assert tuple(found[member] for member in ("message", "type", "param", "code")) == error


def test_more_members_are_kept() -> None:
    shaped = in_shape(b'{"error": {"message": "m", "metadata": {"provider": "p"}}, "user_id": "u"}')
    assert shaped is not None
    assert json.loads(shaped)["error"]["metadata"] == {"provider": "p"}
    assert json.loads(shaped)["user_id"] == "u"


@pytest.mark.parametrize("body", [b"", b"<html>", b"[1]", b'"text"', b"3", b'{"id": 1}', b'{"error": 5}'])
def test_what_tells_no_error_stays(body: bytes) -> None:
    assert in_shape(body) is None


def test_keys_are_taken_out() -> None:
    assert redacted(b"bad key sk-of-ours-1 (sk-of-ours-1)", b"sk-of-ours-1") == (
        b"bad key [redacted]** ([redacted]**)",
        b"",
    )
    assert redacted(b"fine", b"sk-1") == (b"fine", b"")


@given(st.lists(st.sampled_from([b"s", b"sk", b"sk-", b"sk-s", b"-sk-1", b"k-1", b"1", b"", b"sk-sk-1"])))
def test_keys_are_taken_out_wherever_pieces_part(pieces: list[bytes]) -> None:
    told, held = b"", b""
    for piece in pieces:
        more, held = redacted(held + piece, b"sk-sk-1")
        told += more
        assert b"sk-sk-1" not in told
        assert len(held) < len(b"sk-sk-1")
    assert told + held == b"".join(pieces).replace(b"sk-sk-1", b"*******")
