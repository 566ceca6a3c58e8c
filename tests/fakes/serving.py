"""Runs an ASGI app on a free loopback port, in a thread with a loop of its own, as a real server would run it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI

from proxy import server as proxy_server

_WAIT_S = 30


class _Told(uvicorn.Server):
    """Says when it has started and stops when told, so that nobody has to poll."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.up = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()
        self._stopping = asyncio.Event()
        self.up.set()

    async def main_loop(self) -> None:
        # The original looks ten times a second whether it should end.
        await self._stopping.wait()

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._stopping.set)


class _ProxyServer(_Told, proxy_server.Server):
    """The proxy's own server. Waits for nobody: a test that failed may have left requests behind."""

    async def _serve(self, sockets: list[socket.socket] | None = None) -> None:
        # As `winnow serve` does it.
        async with self.app.router.lifespan_context(self.app):
            await super()._serve(sockets)

    def __init__(self, app: FastAPI) -> None:
        super().__init__(app, app.state.gate)
        self.app = app

    def stop(self) -> None:
        self.force_exit = True
        super().stop()


@contextlib.contextmanager
def serving(app: Any) -> Iterator[str]:
    """The server's base URL, without a path. The proxy runs on its own server, anything else on uvicorn's."""
    # asyncio turns delays (Nagle) off only for sockets that name their protocol, as those of `winnow serve` do.
    listening = socket.socket(proto=socket.IPPROTO_TCP)
    listening.bind(("127.0.0.1", 0))
    server = _ProxyServer(app) if isinstance(app, FastAPI) and hasattr(app.state, "gate") else _Told(_plain(app))
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[listening])), daemon=True)
    thread.start()
    try:
        assert server.up.wait(_WAIT_S), "the server did not start"
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.stop()
        thread.join(_WAIT_S)
        listening.close()
        assert not thread.is_alive(), "the server did not stop"


def _plain(app: Any) -> uvicorn.Config:
    return uvicorn.Config(
        app, lifespan="on", log_level="error", timeout_graceful_shutdown=1, server_header=False, access_log=False
    )
