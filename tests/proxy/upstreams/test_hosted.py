"""The HTTP client's bounds: what an upstream sends, however it is packed, costs no more memory than it may."""

from __future__ import annotations

import asyncio
import gzip
import resource
import zlib

import brotli
import pytest
from backports import zstd

from proxy.config import UpstreamSettings
from proxy.upstreams.base import UpstreamCall, UpstreamError
from proxy.upstreams.hosted import HostedUpstream
from tests.fakes import faulty
from tests.fakes.faulty import Asked, FaultyUpstream, Wire

MIB = 1024 * 1024
BOMB_MIB = 512


def packed(encoding: str) -> bytes:
    """Much of nothing, in little."""
    if encoding == "br":
        brotli_packer = brotli.Compressor(quality=1)
        return b"".join([brotli_packer.process(bytes(MIB)) for _ in range(BOMB_MIB)]) + brotli_packer.finish()
    packer = (
        zstd.ZstdCompressor() if encoding == "zstd" else zlib.compressobj(9, wbits=31 if encoding == "gzip" else 15)
    )
    return b"".join([packer.compress(bytes(MIB)) for _ in range(BOMB_MIB)]) + packer.flush()


@pytest.mark.parametrize("limited", [True, False])
@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "zstd"])
async def test_a_bomb_is_cut(encoding: str, limited: bool) -> None:
    """Also where uncompressed answers have no limit: a small body must not become a huge one here."""
    upstream = FaultyUpstream()
    body = packed(encoding)
    upstream.script = lambda asked: faulty.whole(body, content_encoding=encoding)
    async with upstream.serving() as url:
        hosted = HostedUpstream(UpstreamSettings(url=url, max_answer_bytes=4 * MIB))
        await hosted.open()
        before_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        response = await hosted.send(UpstreamCall("POST", "/chat/completions", b"{}", limited=limited))
        with pytest.raises(UpstreamError) as caught:
            await response.read()
        assert caught.value.reason == "too_large"
        await response.aclose()
        await hosted.aclose()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before_kib < 32 * 1024


@pytest.mark.parametrize("encoding", ["br", "zstd", "made-up"])
@pytest.mark.parametrize("method", ["GET", "POST"])
async def test_what_cannot_be_unpacked_is_never_taken_for_text(
    encoding: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("aiohttp.http_parser.HAS_BROTLI", False)
    monkeypatch.setattr("aiohttp.http_parser.HAS_ZSTD", False)
    upstream = FaultyUpstream()
    upstream.script = lambda asked: faulty.whole(b"\x00\x01\x02\x03" * 8, content_encoding=encoding)
    async with upstream.serving() as url:
        hosted = HostedUpstream(UpstreamSettings(url=url))
        await hosted.open()
        with pytest.raises(UpstreamError, match=f"{encoding}.*winnow.encodings. reads br and zstd") as caught:
            await hosted.send(UpstreamCall(method, "/models", limited=False))
        assert caught.value.reason == "encoding"
        await hosted.aclose()


async def test_an_error_that_cannot_be_unpacked_is_still_that_error() -> None:
    upstream = FaultyUpstream()
    upstream.script = lambda asked: faulty.whole_with(429, b"\x00\x01", content_encoding="made-up")
    async with upstream.serving() as url:
        hosted = HostedUpstream(UpstreamSettings(url=url))
        await hosted.open()
        response = await hosted.send(UpstreamCall("POST", "/chat/completions", b"{}"))
        assert (response.status, await response.read()) == (429, b"")
        assert "content-encoding" not in response.headers
        await hosted.aclose()


@pytest.mark.parametrize("encoding", ["gzip", "br", "zstd"])
async def test_packed_answers_are_asked_for_by_nobody_and_read_all_the_same(encoding: str) -> None:
    pack = {"gzip": gzip.compress, "br": brotli.compress, "zstd": zstd.compress}[encoding]
    upstream = FaultyUpstream()
    upstream.script = lambda asked: faulty.whole(pack(b'{"a": 1}'), content_encoding=encoding)
    async with upstream.serving() as url:
        hosted = HostedUpstream(UpstreamSettings(url=url))
        await hosted.open()
        response = await hosted.send(UpstreamCall("GET", "/models"))
        assert await response.read() == b'{"a": 1}'
        assert upstream.asked[0].headers["accept-encoding"] == "identity"
        await response.aclose()
        await hosted.aclose()


async def test_redirects_are_not_followed() -> None:
    upstream = FaultyUpstream()
    async with upstream.serving() as url:
        upstream.script = lambda asked: faulty.error(307, location=f"{url}/elsewhere")
        hosted = HostedUpstream(UpstreamSettings(url=url, key="sk-1"))
        await hosted.open()
        response = await hosted.send(UpstreamCall("POST", "/chat/completions", b"{}"))
        assert response.status == 307
        await response.aclose()
        await hosted.aclose()
    assert len(upstream.asked) == 1


@pytest.mark.parametrize("size", [10, 3 * MIB])
async def test_of_an_errors_body_only_so_much_is_read(size: int) -> None:
    upstream = FaultyUpstream()
    upstream.script = lambda asked: faulty.whole_with(503, b"x" * size)
    async with upstream.serving() as url:
        hosted = HostedUpstream(UpstreamSettings(url=url))
        await hosted.open()
        response = await hosted.send(UpstreamCall("POST", "/chat/completions", b"{}"))
        body = await response.read()
        assert response.status == 503
        assert len(body) == min(size, MIB) == int(response.headers["Content-Length"])
        await response.aclose()
        await hosted.aclose()


@pytest.mark.parametrize("status", [200, 503])
async def test_a_key_that_comes_in_pieces_is_taken_out(status: int) -> None:
    gone_on = asyncio.Event()

    async def in_pieces(wire: Wire, asked: Asked) -> None:
        await wire.head(status)
        await wire.send(b"your key is sk-can")
        await gone_on.wait()
        await wire.send(b"ary, or sk-")

    upstream = FaultyUpstream()
    upstream.script = lambda asked: in_pieces
    async with upstream.serving() as url:
        hosted = HostedUpstream(UpstreamSettings(url=url, key="sk-canary"))
        await hosted.open()
        sending = asyncio.create_task(hosted.send(UpstreamCall("POST", "/chat/completions", b"{}")))
        if status == 200:
            pieces = (await sending).stream()
            assert await anext(pieces) == b"your key is "
            gone_on.set()
            assert b"".join([piece async for piece in pieces]) == b"*********, or sk-"
        else:
            gone_on.set()
            assert await (await sending).read() == b"your key is *********, or sk-"
        await (await sending).aclose()
        await hosted.aclose()


async def test_an_error_whose_body_never_comes_is_still_that_error() -> None:
    async def starts(wire: Wire, asked: Asked) -> None:
        await wire.head(429, 100, retry_after="3")
        await wire.left.wait()

    upstream = FaultyUpstream()
    upstream.script = lambda asked: starts
    async with upstream.serving() as url:
        hosted = HostedUpstream(UpstreamSettings(url=url, idle_timeout_s=0.1))
        await hosted.open()
        response = await hosted.send(UpstreamCall("POST", "/chat/completions", b"{}"))
        assert (response.status, await response.read()) == (429, b"")
        assert response.headers["retry-after"] == "3"
        await hosted.aclose()


async def test_an_upstream_that_is_not_open_or_not_there() -> None:
    hosted = HostedUpstream(UpstreamSettings(url="http://127.0.0.1:9/v1"))
    with pytest.raises(UpstreamError) as closed:
        await hosted.send(UpstreamCall("GET", "/models"))
    assert closed.value.reason == "closed"
    assert not await hosted.ready()
    await hosted.open()
    assert not await hosted.ready()
    await hosted.aclose()
