"""A call to the fake fine-tuning services as it came, and the ways they answer."""

from __future__ import annotations

import email.parser
import email.policy
import json
from dataclasses import dataclass
from typing import Any


class Refused(Exception):
    """What a service answers instead."""

    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}


@dataclass
class Call:
    method: str
    path: str
    query: dict[str, str]
    headers: dict[str, str]
    raw: bytes

    @property
    def json(self) -> dict[str, Any]:
        body = json.loads(self.raw)
        assert isinstance(body, dict)
        return body

    @property
    def form(self) -> tuple[dict[str, str], str, bytes]:
        """Fields, the file's name, the file."""
        assert self.headers["content-type"].startswith("multipart/form-data; boundary=")
        head = f"content-type: {self.headers['content-type']}\r\n\r\n".encode()
        message = email.parser.BytesParser(policy=email.policy.HTTP).parsebytes(head + self.raw)
        fields, name, content = {}, "", b""
        for part in message.iter_parts():
            payload = part.get_payload(decode=True)
            assert isinstance(payload, bytes)
            if part.get_filename():
                name, content = str(part.get_filename()), payload
            else:
                fields[str(part.get_param("name", header="content-disposition"))] = payload.decode()
        return fields, name, content


def page(newest_first: list[dict[str, Any]], call: Call) -> dict[str, Any]:
    """A page as the API gives it: after an id, at most `limit`. Small ones, so that clients must turn them."""
    limit = min(int(call.query.get("limit", 2)), 2)
    places = [place for place, one in enumerate(newest_first) if one["id"] == call.query.get("after")]
    rest = newest_first[places[0] + 1 :] if places else newest_first
    return {"object": "list", "data": rest[:limit], "has_more": len(rest) > limit}


async def break_off(send: Any) -> None:
    """An answer of which the server sends no more than the head."""
    head = [(b"content-type", b"application/json"), (b"content-length", b"1000")]
    await send({"type": "http.response.start", "status": 200, "headers": head})
    raise ConnectionError("scripted")
