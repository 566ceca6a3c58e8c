"""Any OpenAI-compatible server, over aiohttp. Bytes go through: nothing here reads a body.

aiohttp because it is measured: the `openai` client costs eleven times its CPU a call.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from types import TracebackType

import aiohttp
from yarl import URL

from proxy.config import UpstreamSettings
from proxy.keys import CREDENTIAL_HEADERS
from proxy.upstreams.base import UpstreamCall, UpstreamError, UpstreamResponse

_READY_TIMEOUT_S = 5.0
_READY_TTL_S = 5.0
"""Probes come every few seconds from every replica: the upstream need not answer each of them."""


class HostedUpstream:
    """One pooled client session for the server's whole life."""

    def __init__(self, settings: UpstreamSettings) -> None:
        if settings.url is None:
            raise ValueError("upstream.url is not set")
        self._settings = settings
        self._base_url = settings.url.rstrip("/")
        self._key = settings.key.get_secret_value() if settings.key is not None else None
        self._session: aiohttp.ClientSession | None = None
        self._ready: tuple[float, bool] | None = None

    @property
    def name(self) -> str:
        return self._settings.name

    async def open(self) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._settings.max_connections, ttl_dns_cache=60),
            # Silence is timed in `send` and `stream`, where first byte and pauses are told apart.
            timeout=aiohttp.ClientTimeout(
                total=self._settings.total_timeout_s, connect=None, sock_connect=self._settings.connect_timeout_s
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            # aiohttp would add its own; what is sent is decided by the caller alone.
            skip_auto_headers=("User-Agent", "Accept-Encoding", "Accept", "Content-Type"),
            trust_env=self._settings.use_proxy_environment,
        )

    async def send(self, call: UpstreamCall) -> UpstreamResponse:
        if self._session is None:
            raise UpstreamError("closed", f"The upstream {self.name} is not open")
        # Already escaped by whoever made the path: joining must not escape it again.
        query = f"?{call.query}" if call.query else ""
        url = URL(f"{self._base_url}{call.path}{query}", encoded=True)
        with _mapped(self.name, "first byte", self._settings.first_byte_timeout_s):
            async with asyncio.timeout(self._settings.first_byte_timeout_s):
                response = await self._session.request(
                    call.method, url, data=call.body, headers=self._headers(call.headers), allow_redirects=False
                )
        return _HostedResponse(response, self.name, self._settings.idle_timeout_s)

    async def ready(self) -> bool:
        """It answers `/models`, be it with a refusal: clients bring their own keys."""
        now = time.monotonic()
        if self._ready is not None and now - self._ready[0] < _READY_TTL_S:
            return self._ready[1]
        try:
            async with asyncio.timeout(_READY_TIMEOUT_S):
                response = await self.send(UpstreamCall("GET", "/models"))
                answers = response.status < 500
                await response.aclose()
        except (UpstreamError, TimeoutError):
            answers = False
        self._ready = (now, answers)
        return answers

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        if self._key is None:
            return dict(headers)
        kept = {name: value for name, value in headers.items() if name.lower() not in CREDENTIAL_HEADERS}
        return kept | {"authorization": f"Bearer {self._key}"}


class _HostedResponse:
    def __init__(self, response: aiohttp.ClientResponse, upstream: str, idle_timeout_s: float) -> None:
        self._response = response
        self._upstream = upstream
        self._idle_timeout_s = idle_timeout_s

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        return self._response.headers

    async def read(self) -> bytes:
        return b"".join([piece async for piece in self.stream()])

    async def stream(self) -> AsyncIterator[bytes]:
        content = self._response.content
        while True:
            with _mapped(self._upstream, "next byte", self._idle_timeout_s):
                async with asyncio.timeout(self._idle_timeout_s):
                    piece = await content.readany()
            if not piece:
                return
            yield piece

    async def aclose(self) -> None:
        # Drops the connection unless the body was read to its end, which cancels the work upstream.
        self._response.close()


class _mapped:
    """Maps foreign errors to `UpstreamError`, once, here."""

    def __init__(self, upstream: str, awaited: str, timeout_s: float) -> None:
        self._upstream = upstream
        self._awaited = awaited
        self._timeout_s = timeout_s

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        name = self._upstream
        match error:
            case aiohttp.ConnectionTimeoutError():
                raise UpstreamError("timeout", f"No connection to the upstream {name} in time") from error
            case TimeoutError():
                message = f"The upstream {name} timed out: no {self._awaited} within {self._timeout_s:g} s"
                raise UpstreamError("timeout", message) from error
            case aiohttp.ClientConnectorError():
                raise UpstreamError("connect", f"The upstream {name} cannot be reached") from error
            case aiohttp.ClientError() | ConnectionError():
                raise UpstreamError("broken", f"The upstream {name} broke off its answer") from error
