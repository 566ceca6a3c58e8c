"""Every other path and method under `/v1`: to the upstream and back, bodies streamed both ways."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass

from starlette.types import Receive, Scope, Send

from proxy.admission import client_left, while_client_waits
from proxy.errors import NotFoundError
from proxy.gateway import Gateway
from proxy.headers import request_headers
from proxy.relay import relay
from proxy.upstreams.base import UpstreamCall

PREFIX = "/v1"
_WAITING_PIECES = 4
"""Pieces of a request body read ahead of the upstream. The server stops reading the socket beyond."""


@dataclass(frozen=True, slots=True)
class PassthroughEndpoint:
    """An ASGI application for all that no other route takes."""

    gateway: Gateway

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = request_headers(scope)
        has_body = "transfer-encoding" in headers or headers.get("content-length", "0") != "0"
        body = _ClientBody(receive)
        if ".." in scope["path"].split("/"):
            # Joined to the base URL it would lead out of it, with the upstream's key in hand.
            raise NotFoundError("A path with `..` leads nowhere")
        # The path as the client escaped it: decoding and escaping anew would change some.
        path = scope.get("raw_path", scope["path"].encode()).decode("latin-1").removeprefix(PREFIX)
        forwarded = self.gateway.forwarded(headers)
        if has_body and "content-length" in headers:
            forwarded["content-length"] = headers["content-length"]
        call = UpstreamCall(
            scope["method"],
            path,
            body.pieces() if has_body else None,
            forwarded,
            scope.get("query_string", b"").decode("latin-1"),
        )
        with self.gateway.admission.admit():
            await while_client_waits(body.pump(), self._relay(call, send))

    async def _relay(self, call: UpstreamCall, send: Send) -> None:
        await relay(self.gateway, call, send, {})


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
