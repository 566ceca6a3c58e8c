"""How the paths of our own begin that take a JSON object: method, place, body. Generation has a longer story."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from starlette.types import Receive, Scope

from proxy.errors import MethodNotAllowedError
from proxy.exchange import exchange_of
from proxy.request import parse_object


@asynccontextmanager
async def posted_object(scope: Scope, receive: Receive) -> AsyncIterator[dict[str, Any]]:
    """The body, while its request holds a place in flight.

    Raises `MethodNotAllowedError`, `OverloadedError`, `BodyTooLargeError`, `ClientGoneError`, `BadRequestError`.
    """
    if scope["method"] != "POST":
        # Ours alone: the upstream, to which unknown paths go, could only be confused by it.
        raise MethodNotAllowedError(f"Method Not Allowed: {scope['method']} {scope['path']}")
    exchange = exchange_of(scope)
    with exchange.gateway.admission.admit() as place:
        raw = await place.read_body(receive, exchange.headers)
        yield parse_object(raw, exchange.gateway.settings.server.json_limits)
