"""Every other path and method under `/v1`: to the upstream and back, bodies streamed both ways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping

from starlette.types import Receive, Scope, Send

from proxy.admission import client_left, while_client_waits
from proxy.errors import NotFoundError
from proxy.exchange import Exchange, exchange_of
from proxy.headers import request_headers
from proxy.relay import Relay
from proxy.routing import DEFAULT, Route
from proxy.upstreams.base import UpstreamCall
from proxy.upstreams.retries import RetryBudget

PREFIX = "/v1"
ROUTE_HEADER = "x-winnow-route"
_WAITING_PIECES = 4
"""Pieces of a request body read ahead of the upstream. The server stops reading the socket beyond."""


async def passthrough(scope: Scope, receive: Receive, send: Send) -> None:
    """An ASGI application for all that no other route takes. Raises `NotFoundError` and what `Relay` raises."""
    exchange = exchange_of(scope)
    headers = request_headers(scope)
    route = _route(exchange, headers)
    has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
    body = _ClientBody(receive)
    if ".." in scope["path"].split("/"):
        # Joined to the base URL it would lead out of it, with the upstream's key in hand.
        raise NotFoundError("A path with `..` leads nowhere")
    # The path as the client escaped it: decoding and escaping anew would change some.
    path = scope.get("raw_path", scope["path"].encode()).decode("latin-1").removeprefix(PREFIX)
    forwarded = exchange.gateway.forwarded(headers, route)
    if has_body and "content-length" in headers:
        forwarded["content-length"] = headers["content-length"]
    call = UpstreamCall(
        scope["method"],
        path,
        body.pieces() if has_body else None,
        forwarded,
        scope.get("query_string", b"").decode("latin-1"),
        limited=False,
    )
    with exchange.gateway.admission.admit():
        await while_client_waits(body.pump(), _relay(route, call, headers, send))


async def _relay(route: Route, call: UpstreamCall, headers: Mapping[str, str], send: Send) -> None:
    # A body that is streamed through cannot be sent twice, and what changes something must not be.
    may_repeat = call.method in ("GET", "HEAD") and call.body is None
    max_retries = route.settings.max_retries if may_repeat else 0
    answer = await Relay(route.upstream, RetryBudget.of(max_retries, headers), "anything").answer(call)
    await answer.send(send, {})


def _route(exchange: Exchange, headers: Mapping[str, str]) -> Route:
    """The default route, or the one that the client names: bodies are not read here, so no model's name decides."""
    name = headers.get(ROUTE_HEADER, DEFAULT)
    route = exchange.gateway.routing.named(name)
    if route is None:
        raise NotFoundError(f"No route is named {name!r} here", param=ROUTE_HEADER, code="route_not_found")
    exchange.facts.route = route.name
    return route


class _ClientBody:
    """Hands the request body on while watching, all along, whether the client is still there."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._pieces: asyncio.Queue[bytes | None] = asyncio.Queue(_WAITING_PIECES)

    async def pump(self) -> None:
        """Returns when the client has left."""
        more = True
        while more:
            message = await self._receive()
            if message["type"] == "http.disconnect":
                return
            if message.get("body"):
                await self._pieces.put(message["body"])
            more = message.get("more_body", False)
        await self._pieces.put(None)
        await client_left(self._receive)

    async def pieces(self) -> AsyncIterator[bytes]:
        while (piece := await self._pieces.get()) is not None:
            yield piece
