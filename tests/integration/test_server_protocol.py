"""Real sockets that do to the server what no client library would: dribble, flood, smuggle, stay."""

from __future__ import annotations

import asyncio
import contextlib
import json
import select
import selectors
import socket
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from tests.conftest import RunningProxy, StartProxy
from tests.fakes.serving import serving

SHORT = {"header_timeout_s": 1.0, "body_timeout_s": 1.0, "idle_timeout_s": 1.0, "write_timeout_s": 1.0}
BODY = json.dumps({"model": "m", "best_of": 1, "messages": [{"role": "user", "content": "x"}]}).encode()
POST = b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
WHOLE = POST + b"content-length: %d\r\n\r\n" % len(BODY) + BODY


def connect(proxy: RunningProxy) -> socket.socket:
    host, port = proxy.url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=20)


def exchange(proxy: RunningProxy, sent: bytes) -> bytes:
    """All that comes back until the server closes the connection."""
    with connect(proxy) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(sent)
        return read_all(connection)


def read_all(connection: socket.socket) -> bytes:
    received = b""
    with contextlib.suppress(ConnectionError):
        while piece := connection.recv(65_536):
            received += piece
    return received


def error_of(answer: bytes) -> tuple[int, dict[str, str | None]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"\r\nconnection: close" in head.lower()
    envelope = json.loads(body)
    assert set(envelope["error"]) == {"message", "type", "param", "code"}
    return int(head.split()[1]), envelope["error"]


class TestMalformed:
    @pytest.mark.parametrize(
        "request_bytes",
        [
            POST + b"content-length: 4\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            POST + b"transfer-encoding: chunked\r\ncontent-length: 4\r\n\r\n0\r\n\r\n",
            POST + b"content-length: 4\r\ncontent-length: 5\r\n\r\nabcd",
            POST + b"content-length: 4\r\ncontent-length: 4\r\n\r\nabcd",
            POST + b"content-length: +4\r\n\r\nabcd",
            POST + b"content-length: 4,4\r\n\r\nabcd",
            POST + b"transfer-encoding: gzip, chunked\r\n\r\n0\r\n\r\n",
            POST + b"transfer-encoding: xchunked\r\n\r\n0\r\n\r\n",
            POST + b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
            POST + b"transfer-encoding : chunked\r\n\r\n0\r\n\r\n",
            POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n",
            POST + b"x-folded: a\r\n  b\r\n\r\n",
            b"GET /healthz HTTP/1.1\nhost: localhost\n\n",
            b"GET /healthz HTTP/1.1\r\nhost: localhost\n\r\n",
            b"GET /healthz HTTP/1.1\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nhost: a\r\nhost: b\r\n\r\n",
            b"GET /healthz HTTP/9.9\r\nhost: a\r\n\r\n",
            b"GET /\xff HTTP/1.1\r\nhost: a\r\n\r\n",
            b"GET /a\x00b HTTP/1.1\r\nhost: a\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nhost: a\r\nx: a\x00b\r\n\r\n",
            b"CONNECT canary:80 HTTP/1.1\r\nhost: a\r\n\r\n",
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
            b"nonsense\r\n\r\n",
        ],
    )
    def test_is_a_400_in_the_envelope_and_the_end(self, proxy: RunningProxy, request_bytes: bytes) -> None:
        status, error = error_of(exchange(proxy, request_bytes + b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n"))
        assert status == 400
        assert error["code"] == "invalid_http"
        assert not proxy.upstream.received and not proxy.upstream.others
        assert proxy.metric("winnow_connections_refused_total", reason="malformed") == 1

    def test_a_bad_request_behind_a_good_one_does_not_spoil_its_answer(self, proxy: RunningProxy) -> None:
        answer = exchange(proxy, WHOLE + b"nonsense\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 ")
        assert answer.count(b"HTTP/1.1") == 1

    @pytest.mark.parametrize("num_good", [1, 3])
    def test_nor_does_a_bad_body_behind_it(self, proxy: RunningProxy, num_good: int) -> None:
        answer = exchange(proxy, WHOLE * num_good + POST + b"transfer-encoding: chunked\r\n\r\nzz\r\n")
        assert answer.count(b"HTTP/1.1 200 ") == answer.count(b"HTTP/1.1") == num_good
        assert b"connection: close" in answer.rpartition(b"HTTP/1.1")[2].lower()

    def test_old_clients_and_pipelines_are_served(self, proxy: RunningProxy) -> None:
        assert exchange(proxy, b"GET /healthz HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
        both = WHOLE + b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n"
        answers = exchange(proxy, both)
        assert answers.count(b"HTTP/1.1 200 ") == 2
        assert answers.endswith(b'{"status":"ok"}')

    def test_an_offer_of_another_protocol_is_declined(self, proxy: RunningProxy) -> None:
        upgrade = (
            b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: upgrade\r\nupgrade: %s\r\n\r\nGET / HTTP/1.1\r\n\r\n"
        )
        for protocol in (b"h2c", b"websocket"):
            answer = exchange(proxy, upgrade % protocol)
            assert answer.startswith(b"HTTP/1.1 200 ")
            assert answer.count(b"HTTP/1.1") == 1


class TestTooLarge:
    @pytest.mark.parametrize(
        "head",
        [
            b"GET /healthz HTTP/1.1\r\nhost: a\r\nx: " + b"a" * 40_000 + b"\r\n\r\n",
            b"GET /healthz HTTP/1.1\r\nhost: a\r\n" + b"".join(b"x-%d: a\r\n" % i for i in range(200)) + b"\r\n",
            b"GET /" + b"a" * 40_000 + b" HTTP/1.1\r\nhost: a\r\n\r\n",
            b"GET /" + b"a" * 40_000,
        ],
    )
    def test_headers(self, proxy: RunningProxy, head: bytes) -> None:
        status, error = error_of(exchange(proxy, head))
        assert status == 431
        assert error["code"] == "headers_too_large"
        assert proxy.metric("winnow_connections_refused_total", reason="header_size") == 1

    def test_a_large_body_right_behind_the_headers_is_no_header(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(server={"max_header_bytes": 1024})
        body = json.dumps(
            {"model": "m", "best_of": 1, "messages": [{"role": "user", "content": "x" * 90_000}]}
        ).encode()
        request = POST + b"content-length: %d\r\n\r\n" % len(body) + body
        with connect(proxy) as connection:
            connection.sendall(request * 2 + b"GET /healthz HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n")
            assert read_all(connection).count(b"HTTP/1.1 200 ") == 3

    @pytest.mark.parametrize("start", [b"GET / HTTP/1.1\r\nhost: a\r\nx: ", POST + b"content-length: 64000000\r\n\r\n"])
    def test_64_mb_are_not_even_read(self, proxy: RunningProxy, start: bytes) -> None:
        with connect(proxy) as connection:
            connection.sendall(start)
            answer = b""
            sent = 0
            connection.settimeout(None)
            with contextlib.suppress(ConnectionError), selectors.DefaultSelector() as selector:
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ | selectors.EVENT_WRITE)
                while sent < 64_000_000 and not answer:
                    for _, ready in selector.select(20):
                        if ready & selectors.EVENT_READ:
                            answer = connection.recv(65_536)
                        elif ready & selectors.EVENT_WRITE:
                            sent += connection.send(b"a" * 65_536)
        assert answer.split()[1] in (b"431", b"413", b"400")
        # What the kernel's buffers take and what was on its way.
        assert sent < 16_000_000
        assert not proxy.upstream.received

    def test_a_chunked_body_is_counted_as_it_comes(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(server={"max_body_bytes": 100_000})
        piece = b"8000\r\n" + b" " * 0x8000 + b"\r\n"
        answer = exchange(proxy, POST + b"transfer-encoding: chunked\r\n\r\n" + piece * 6)
        assert error_of(answer)[0] == 413
        assert not proxy.upstream.received

    def test_who_is_refused_while_sending_still_reads_why(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(server={"max_body_bytes": 100_000})
        answer = httpx2.post(f"{proxy.url}/v1/chat/completions", content=b"x" * 5_000_000)
        assert answer.status_code == 413


class TestSlow:
    @contextlib.contextmanager
    def crowd(self, proxy: RunningProxy, start: bytes, count: int = 200) -> Iterator[list[socket.socket]]:
        with contextlib.ExitStack() as opened:
            connections = []
            for _ in range(count):
                connections.append(opened.enter_context(connect(proxy)))
                # At once: once all are connected, on a busy machine, the first would have been idle too long.
                connections[-1].sendall(start)
            yield connections

    @pytest.mark.parametrize(
        ("start", "dribble", "status"),
        [
            (b"", b"", None),
            (b"\r\n", b"\r\n", 408),
            (b"POST /v1/chat/completions HTTP/1.1\r\nhost: a\r\n", b"x: y\r\n", 408),
            (POST + b"content-length: 90000\r\n\r\n{", b" ", 408),
            (POST + b"transfer-encoding: chunked\r\n\r\n1\r\n{\r\n", b"1\r\n \r\n", 408),
            (b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n", b"\r\n", 200),
        ],
        ids=["idle", "blank-lines", "headers", "body", "chunks", "kept-alive"],
    )
    def test_200_sockets_are_closed_while_others_are_served(
        self, start_proxy: StartProxy, start: bytes, dribble: bytes, status: int | None
    ) -> None:
        proxy = start_proxy(server=SHORT)
        began = time.monotonic()
        with self.crowd(proxy, start) as connections, selectors.DefaultSelector() as selector:
            for connection in connections:
                connection.settimeout(0)
                selector.register(connection, selectors.EVENT_READ, bytearray())
            served = 0
            while selector.get_map():
                assert time.monotonic() - began < 15
                answer = proxy.client.chat.completions.create(
                    model="m", messages=[{"role": "user", "content": "x"}], extra_body={"best_of": 1}
                )
                served += answer.choices[0].message.content == "an answer"
                for key, _ in selector.select(0.05):
                    if drained(key.fileobj, key.data):  # type: ignore[arg-type]
                        selector.unregister(key.fileobj)
                        assert (int(key.data.split()[1]) if key.data else None) == status
                for key in list(selector.get_map().values()):
                    with contextlib.suppress(OSError):
                        key.fileobj.send(dribble)  # type: ignore[union-attr]
        assert served
        # The last answered request may not have left yet; none of the crowd is left.
        assert proxy.metric("winnow_in_flight") <= 1

    def test_a_body_that_we_ourselves_hold_up_is_not_slow(self, start_proxy: StartProxy) -> None:
        """An upload that the upstream does not read yet: the client cannot send any faster."""
        proxy = start_proxy(server=SHORT | {"min_rate": 100_000})
        with connect(proxy) as connection:
            connection.sendall(b"POST /v1/files HTTP/1.1\r\nhost: a\r\ncontent-length: 300000\r\n\r\n" + b"x" * 300_000)
            assert connection.recv(65_536).startswith(b"HTTP/1.1 200 ")

    def test_a_reader_that_does_not_read_is_cut_off(self, start_proxy: StartProxy) -> None:
        fountain = Fountain()
        with serving(fountain) as url:
            proxy = start_proxy(server=SHORT, upstream={"url": f"{url}/v1"})
            with connect(proxy) as connection:
                body = BODY.replace(b'"best_of"', b'"stream":true,"best_of"')
                connection.sendall(POST + b"content-length: %d\r\n\r\n" % len(body) + body)
                reset = select.poll()
                reset.register(connection, 0)
                assert reset.poll(20_000), "the connection was not cut"
            assert fountain.ended.wait(20), "the upstream was not told"
        assert proxy.metric("winnow_connections_refused_total", reason="write_timeout") == 1
        # Two kernel buffers on each of two connections; our own hold some 100 KiB.
        assert fountain.sent_bytes < 40_000_000


class Fountain:
    """An upstream whose stream never ends."""

    def __init__(self) -> None:
        self.sent_bytes = 0
        self.ended = threading.Event()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "lifespan":
            return
        head = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": head})
        left = asyncio.create_task(receive_all(receive))
        while not left.done():
            await send({"type": "http.response.body", "body": b"data: {}\n\n" * 8192, "more_body": True})
            self.sent_bytes += 10 * 8192
        self.ended.set()


async def receive_all(receive: Any) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def drained(connection: socket.socket, into: bytearray) -> bool:
    """Whether the server has closed the connection; what it said until then is added to `into`."""
    try:
        while piece := connection.recv(65_536):
            into += piece
    except BlockingIOError:
        return False
    except ConnectionError:
        return True
    return True


class TestTooMany:
    def test_one_more_takes_the_place_of_an_idle_one(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(server={"max_connections": 2})
        with connect(proxy) as first, connect(proxy) as second:
            for connection in (first, second):
                connection.sendall(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n")
                # Head and body may come apart.
                answer = b""
                while not answer.endswith(b'{"status":"ok"}'):
                    answer += connection.recv(65_536)
                assert answer.startswith(b"HTTP/1.1 200 ")
            assert httpx2.get(f"{proxy.url}/healthz").status_code == 200
            assert first.recv(1) == b""

    def test_or_is_told_to_come_again(self, start_proxy: StartProxy) -> None:
        proxy = start_proxy(server={"max_connections": 1})
        with connect(proxy) as busy:
            busy.sendall(b"GET /heal")
            status, error = error_of(exchange(proxy, b""))
            assert (status, error["code"]) == (503, "max_connections")
            busy.sendall(b"thz HTTP/1.1\r\nhost: a\r\n\r\n")
            assert busy.recv(65_536).startswith(b"HTTP/1.1 200 ")
