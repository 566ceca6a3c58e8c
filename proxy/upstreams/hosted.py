"""Any OpenAI-compatible server, over aiohttp. Bytes go through: nothing here reads a body but that of an error.

Silence, size and time of an answer are bounded here. aiohttp because it is measured: the `openai` client costs eleven
times its CPU a call.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from types import TracebackType

import aiohttp
from aiohttp.http_exceptions import ContentEncodingError
from multidict import CIMultiDict
from yarl import URL

from proxy.config import UpstreamSettings
from proxy.keys import CREDENTIAL_HEADERS
from proxy.upstreams.base import UpstreamCall, UpstreamError, UpstreamResponse
from proxy.upstreams.error_bodies import in_shape, redacted

_log = logging.getLogger(__name__)

_READY_TIMEOUT_S = 5.0
_READY_TTL_S = 5.0
"""Probes come every few seconds from every replica: the upstream need not answer each of them."""
_MAX_ERROR_BYTES = 1024 * 1024
"""An error's body is read whole before anyone sees its status; of a longer one the rest is dropped."""
_UNPACKED = ("gzip", "deflate", "br", "zstd")
"""Encodings that aiohttp undoes, the last two where their libraries are there; it refuses what it cannot undo."""
_NOT_OF_THE_BODY_WE_SEND = ("content-length", "content-encoding", "transfer-encoding")


class HostedUpstream:
    """One pooled client session for the server's whole life."""

    def __init__(self, settings: UpstreamSettings) -> None:
        if settings.url is None:
            raise ValueError("upstream.url is not set")
        self._settings = settings
        self._base_url = settings.url.rstrip("/")
        self._key = settings.key.get_secret_value() if settings.key is not None else None
        self._key_bytes = self._key.encode() if self._key else None
        self._session: aiohttp.ClientSession | None = None
        self._ready: tuple[float, bool] | None = None

    @property
    def name(self) -> str:
        return self._settings.name

    async def open(self) -> None:
        self._session = aiohttp.ClientSession(
            # Calls at once are limited before they come here, where those that wait are counted.
            connector=aiohttp.TCPConnector(limit=0, ttl_dns_cache=60),
            # The rest is timed in `send` and `stream`, where first byte, pauses and the whole are told apart.
            timeout=aiohttp.ClientTimeout(total=None, connect=None, sock_connect=self._settings.connect_timeout_s),
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
        ends_at = asyncio.get_running_loop().time() + self._settings.total_timeout_s
        patience = _Patience(self.name, ends_at, self._settings)
        with patience.wait("first byte", self._settings.first_byte_timeout_s) as until:
            async with asyncio.timeout_at(until):
                answer = await self._session.request(
                    call.method, url, data=call.body, headers=self._headers(call.headers), allow_redirects=False
                )
        encoding = answer.headers.get("content-encoding", "").lower() or "identity"
        max_bytes = self._settings.max_answer_bytes if call.limited or encoding != "identity" else None
        response = _HostedResponse(answer, patience, max_bytes, self._key_bytes)
        readable = encoding == "identity" or encoding in _UNPACKED
        if response.status >= 400 and call.method != "HEAD":
            return await self._error(response, readable=readable)
        if not readable and call.method != "HEAD":
            await response.aclose()
            raise patience.unreadable(f"content-encoding {encoding[:40]!r}")
        return response

    async def _error(self, response: _HostedResponse, *, readable: bool) -> UpstreamResponse:
        """An error answer, whole and fit for clients. Raises `UpstreamError` where its cause is a key of ours."""
        try:
            body = await response.beginning(_MAX_ERROR_BYTES) if readable else b""
        finally:
            await response.aclose()
        if self._key is not None and response.status in (401, 403):
            _log.warning("The upstream %s refused our key: %s %r", self.name, response.status, body[:300])
            # As it is, it would blame the client's key, which the upstream never saw.
            message = f"The upstream {self.name} refused the key that this server holds for it"
            raise UpstreamError("authentication", message)
        headers = CIMultiDict(response.headers)
        for name in _NOT_OF_THE_BODY_WE_SEND:
            headers.popall(name, None)
        shaped = in_shape(body)
        if shaped is not None:
            headers["content-type"] = "application/json"
            body = shaped
        headers["content-length"] = str(len(body))
        return _WholeResponse(response.status, headers, body)

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
        except UpstreamError as error:
            answers = error.reason == "authentication"
        except TimeoutError:
            answers = False
        self._ready = (now, answers)
        return answers

    async def aclose(self) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    def _headers(self, headers: Mapping[str, str]) -> dict[str, str]:
        # Packing would buy little on the way from a data centre, and cost its unpacking.
        unpacked = {"accept-encoding": "identity"}
        if self._key is None:
            return dict(headers) | unpacked
        kept = {name: value for name, value in headers.items() if name.lower() not in CREDENTIAL_HEADERS}
        return kept | unpacked | {"authorization": f"Bearer {self._key}"}


class _HostedResponse:
    def __init__(
        self, response: aiohttp.ClientResponse, patience: _Patience, max_bytes: int | None, key: bytes | None
    ) -> None:
        self._response = response
        self._key = key
        self._patience = patience
        self._max_bytes = max_bytes
        self._size = 0
        self._held = b""
        """The end of what came, where it may be the beginning of our key."""

    @property
    def status(self) -> int:
        return self._response.status

    @property
    def headers(self) -> Mapping[str, str]:
        return self._response.headers

    async def read(self) -> bytes:
        pieces = []
        while piece := await self._next():
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    async def stream(self) -> AsyncIterator[bytes]:
        while piece := await self._next():
            yield piece

    async def _next(self) -> bytes:
        """The next piece of the body; an empty one is its end."""
        content = self._response.content
        if content.at_eof() and content.exception() is None:
            return self._rest()
        with self._patience.wait("next byte", self._patience.settings.idle_timeout_s) as until:
            # Most often it is there: a timer would cost more than the reading.
            piece = content.read_nowait()
            if not piece:
                async with asyncio.timeout_at(until):
                    piece = await content.readany()
        if not piece:
            return self._rest()
        self._size += len(piece)
        if self._max_bytes is not None and self._size > self._max_bytes:
            upstream = self._patience.upstream
            raise UpstreamError("too_large", f"The upstream {upstream} sent over {self._max_bytes} bytes")
        if self._key is None:
            return piece
        # Some servers quote the key they were sent in an error inside an answer, or inside a stream.
        told, self._held = redacted(self._held + piece, self._key)
        return told or await self._next()

    def _rest(self) -> bytes:
        rest, self._held = self._held, b""
        return rest

    async def beginning(self, max_bytes: int) -> bytes:
        """What comes of the body, up to that size. Never raises `UpstreamError`: the status is known already."""
        pieces: list[bytes] = []
        size = 0
        try:
            async for piece in self.stream():
                pieces.append(piece)
                size += len(piece)
                if size >= max_bytes:
                    break
        except UpstreamError as error:
            _log.warning("Of an error answer, %d bytes came: %s", size, error)
        return b"".join(pieces)[:max_bytes]

    async def aclose(self) -> None:
        # Drops the connection unless the body was read to its end, which cancels the work upstream.
        self._response.close()


@dataclass(frozen=True, slots=True)
class _WholeResponse:
    """An `UpstreamResponse` that has been read."""

    status: int
    headers: Mapping[str, str]
    body: bytes

    async def read(self) -> bytes:
        return self.body

    async def stream(self) -> AsyncIterator[bytes]:
        yield self.body

    async def aclose(self) -> None:
        return None


class _Patience:
    """How long one call may take, and what foreign errors become: mapped to `UpstreamError` once, here."""

    def __init__(self, upstream: str, ends_at: float, settings: UpstreamSettings) -> None:
        self.upstream = upstream
        self.settings = settings
        self._ends_at = ends_at
        self._awaited = ""
        self._timeout_s = 0.0

    def wait(self, awaited: str, timeout_s: float) -> _Patience:
        self._awaited, self._timeout_s = awaited, timeout_s
        return self

    def __enter__(self) -> float:
        """The loop's time to wait until."""
        now = asyncio.get_running_loop().time()
        if now >= self._ends_at:
            raise self._too_long()
        return min(now + self._timeout_s, self._ends_at)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            return
        name = self.upstream
        match error:
            case aiohttp.ConnectionTimeoutError():
                raise UpstreamError("connect", f"No connection to the upstream {name} in time") from error
            case TimeoutError() if asyncio.get_running_loop().time() >= self._ends_at:
                raise self._too_long() from error
            case TimeoutError():
                message = f"The upstream {name} timed out: no {self._awaited} within {self._timeout_s:g} s"
                raise UpstreamError("timeout", message) from error
            case aiohttp.ClientResponseError() if _is_of_packing(error):
                raise self.unreadable(error.message.strip()) from error
            case aiohttp.ClientConnectorError():
                raise UpstreamError("connect", f"The upstream {name} cannot be reached") from error
            case aiohttp.ClientError() | ConnectionError():
                raise UpstreamError("broken", f"The upstream {name} broke off its answer") from error

    def unreadable(self, why: str) -> UpstreamError:
        message = f"The upstream {self.upstream} packed its answer, unasked, in a way that cannot be read here"
        return UpstreamError("encoding", f"{message} ({why}). winnow[encodings] reads br and zstd")

    def _too_long(self) -> UpstreamError:
        whole = f"no whole answer within {self.settings.total_timeout_s:g} s"
        return UpstreamError("timeout", f"The upstream {self.upstream} timed out: {whole}")


def _is_of_packing(error: BaseException | None) -> bool:
    """It began with an encoding that aiohttp does not know, or has no library for."""
    while error is not None:
        if isinstance(error, ContentEncodingError):
            return True
        error = error.__cause__ or error.__context__
    return False
