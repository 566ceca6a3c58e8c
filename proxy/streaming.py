"""A best-of-N answer as a stream: comments until the winner is known, then its own chunks."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from starlette.types import Send

from proxy.errors import InternalError, ProxyError
from proxy.headers import raw
from proxy.response import Result, chunks, headers
from proxy.sse import DONE, KEEPALIVE, event

_log = logging.getLogger(__name__)

_STREAM_HEADERS = {
    "content-type": "text/event-stream; charset=utf-8",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_PIECE_BYTES = 64 * 1024
"""Chunks go out together up to this size: the winner is known, so there is nothing to wait for between them."""


async def stream_result(work: Coroutine[Any, Any, Result], keepalive_s: float, send: Send) -> None:
    """Runs `work` and replays its winners.

    Raises `ProxyError` while no byte was sent: the error then has its real status. Afterwards it becomes an event,
    and the stream ends without `[DONE]`, which clients would take for success.
    """
    task = asyncio.create_task(work)
    started = False
    try:
        while not task.done():
            await asyncio.wait((task,), timeout=keepalive_s)
            if not task.done():
                if not started:
                    await _start(send, {})
                    started = True
                await _send(send, KEEPALIVE)
        try:
            result = task.result()
        except Exception as error:
            if not started:
                raise
            await _send(send, event(_as_error(error).body()), more=False)
            return
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if not started:
        await _start(send, headers(result))
    await _replay(result, send)


async def _replay(result: Result, send: Send) -> None:
    piece = bytearray()
    for payload in chunks(result):
        piece += event(payload)
        if len(piece) >= _PIECE_BYTES:
            await _send(send, bytes(piece))
            piece.clear()
    piece += event(DONE)
    await _send(send, bytes(piece), more=False)


async def _start(send: Send, more: dict[str, str]) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": raw(more | _STREAM_HEADERS)})


async def _send(send: Send, body: bytes, *, more: bool = True) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})


def _as_error(error: Exception) -> ProxyError:
    if isinstance(error, ProxyError):
        return error
    _log.error("A streamed request failed", exc_info=error)
    return InternalError("Something went wrong on this server")
