"""An upstream's error answer made fit for clients: the whole envelope, members of the right types, no key of ours."""

from __future__ import annotations

from typing import Any

import orjson

from proxy.errors import envelope

_REDACTED = b"[redacted]"
_TYPE = "upstream_error"


def in_shape(body: bytes) -> bytes | None:
    """The body with all of the envelope's members, each as clients expect it; None where it is no JSON error.

    Servers differ: `code` as an integer, members missing, `{"error": "text"}`, `{"detail": …}`, `{"message": …}`.
    """
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if not isinstance(parsed, dict):
        return None
    error = parsed.get("error")
    if isinstance(error, dict):
        around = parsed
    else:
        error = _loose(parsed, error)
        around = {}
        if error is None:
            return None
    shaped = envelope(_text(error.get("message")) or "", _TYPE, None)["error"] | error
    shaped["message"] = _text(error.get("message")) or ""
    shaped["type"] = _text(error.get("type")) or _TYPE
    shaped["param"], shaped["code"] = _text(error.get("param")), _text(error.get("code"))
    if shaped == error:
        return body
    return orjson.dumps(around | {"error": shaped})


def redacted(piece: bytes, key: bytes) -> tuple[bytes, bytes]:
    """Without the key, which some servers quote; and what at the end may be its beginning, kept for the next piece.

    No byte longer or shorter: the client may have been told how many there are.
    """
    if key in piece:
        mask = _REDACTED if len(key) >= len(_REDACTED) else b""
        piece = piece.replace(key, mask.ljust(len(key), b"*"))
    start = piece.find(key[:1], max(0, len(piece) - len(key) + 1))
    while start >= 0:
        if key.startswith(piece[start:]):
            return piece[:start], piece[start:]
        start = piece.find(key[:1], start + 1)
    return piece, b""


def _loose(parsed: dict[str, Any], error: object) -> dict[str, Any] | None:
    """An error told otherwise than in an `error` object."""
    if isinstance(error, str):
        return {"message": error}
    if isinstance(parsed.get("message"), str):
        return {member: parsed[member] for member in ("message", "type", "param", "code") if member in parsed}
    if "detail" in parsed:
        return {"message": parsed["detail"]}
    return None


def _text(value: object) -> str | None:
    if value is None or isinstance(value, str):
        return value
    return str(value) if isinstance(value, int | float) else orjson.dumps(value).decode()
