"""One client connection: uvicorn's httptools protocol with the deadlines and bounds it lacks.

Bare, it keeps a socket that dribbles a header for ever, takes a header of any size and a request without a host.
Slow answers are not timed here: `route.deadline_s` and the upstream's time-outs are for those.
"""

from __future__ import annotations

import asyncio
import socket
import struct
import uuid
from enum import Enum, auto
from http import HTTPStatus
from typing import Any, cast

import httptools
from uvicorn.config import Config
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from proxy.admission import Gate
from proxy.answer_writer import AnswerWriter
from proxy.errors import (
    JSON,
    BadRequestError,
    HeadersTooLargeError,
    ProxyError,
    RequestTimeoutError,
    ShuttingDownError,
    TooManyConnectionsError,
)

_LINGER_S = 2.0
"""How long a refused client may go on sending before its connection is cut."""


class _Phase(Enum):
    """What the client is doing."""

    IDLE = auto()
    """Nothing, between two requests."""
    HEAD = auto()
    """Sending a request line and headers; a new connection is expected to begin at once."""
    BODY = auto()
    WAITING = auto()
    """For our answer."""
    LEAVING = auto()
    """The last answer is written; the connection is being closed."""


class GuardedProtocol(HttpToolsProtocol):
    """Refuses in OpenAI's envelope where an answer can still be written, and closes the connection."""

    flow: _Flow

    def __init__(
        self,
        gate: Gate,
        config: Config,
        server_state: ServerState,
        app_state: dict[str, Any],
        _loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        super().__init__(config, server_state, app_state, _loop)
        self._gate = gate
        self._settings = gate.settings
        self._phase = _Phase.HEAD
        self._deaf = False
        """What still comes is thrown away."""
        self._piece_bytes = 0
        """Size of what is being parsed."""
        self._head_bytes = 0
        self._body_bytes = 0
        """Of the running window of `body_timeout_s`."""
        self._read_by: float | None = None
        """Loop time by which the running phase must have moved on; None: the client may take its time."""
        self._written_by: float | None = None
        """Loop time by which the client must have read some of what waits in our buffer."""
        self._unwritten_bytes = 0
        """What waited there when this was last looked at."""
        self._timer: asyncio.TimerHandle | None = None
        self._answering: RequestResponseCycle
        """The oldest that is not answered; behind it wait those of `pipeline`, the newest first."""
        self._fault: ProxyError | None = None
        """Found inside a callback of the parser, which can only raise."""

    # --- the connection's life

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(transport)
        self._writer = AnswerWriter(transport, self.loop, close=self.leave)
        if len(self.connections) > self._settings.max_connections and not self._make_room():
            self._gate.count_refused("connections")
            self._deaf = True
            self.transport.write(_answer(TooManyConnectionsError("The server has as many connections as it takes")))
            self._close()
            return
        self._enter(_Phase.HEAD, self._settings.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._read_by = self._written_by = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._unset_keepalive_if_required()
        before = self._phase
        self._piece_bytes = len(data)
        if before is _Phase.HEAD:
            self._head_bytes += len(data)
        try:
            self.parser.feed_data(data)
        except httptools.HttpParserError:
            self._refuse(self._fault or BadRequestError("This is not valid HTTP", code="invalid_http"), "malformed")
            return
        except httptools.HttpParserUpgrade:
            # Answered as plain HTTP/1.1; what follows would belong to a protocol that was not agreed upon.
            self._deaf = True
        if self._phase is not before:
            self._time_phase()
        if self._phase is _Phase.HEAD and self._head_bytes > self._settings.max_header_bytes:
            self._refuse(self._head_too_large(), "header_size")

    def shutdown(self) -> None:
        """Called once, when the server stops listening: ends what is idle. Running answers are the last here."""
        self._writer.flush()
        if self._phase is _Phase.HEAD and self._head_bytes and (self.cycle is None or self.cycle.response_complete):
            # Half a request: closed without a word, it would look as if it might have been served.
            self._refuse(ShuttingDownError(), "draining")
        elif self._phase is not _Phase.LEAVING:
            super().shutdown()

    # --- what the client reads

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch_writing()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._written_by = None

    def leave(self) -> None:
        """Closes, after the answer that was written; later, if the client is still sending.

        Cut at once, it would see a reset where it should see why it was refused.
        """
        if self._phase is _Phase.LEAVING:
            return
        self._writer.flush()
        if self._phase is not _Phase.BODY or not self.transport.can_write_eof():
            self._close()
            return
        self._deaf = True
        self.transport.write_eof()
        self.flow.resume_reading()
        self._enter(_Phase.LEAVING, _LINGER_S)

    def _close(self) -> None:
        self.transport.close()
        self._enter(_Phase.LEAVING, _LINGER_S)

    def _watch_writing(self) -> None:
        self._unwritten_bytes = self.transport.get_write_buffer_size()
        self._written_by = self.loop.time() + self._settings.write_timeout_s
        self._arm()

    # --- the parser's callbacks

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # A request that begins in the middle of a piece is counted from the next one on.
        self._head_bytes = self._piece_bytes if self._phase in (_Phase.IDLE, _Phase.HEAD) else 0
        self._phase = _Phase.HEAD

    def on_headers_complete(self) -> None:
        self._fault = self._fault_of_head()
        if self._fault is not None:
            raise self._fault
        before = self.cycle
        super().on_headers_complete()
        self._phase = _Phase.BODY
        self._head_bytes = self._body_bytes = 0
        cycle = self.cycle
        if cycle is not before:
            if not self.pipeline:
                self._answering = cycle
            cycle.transport = cast("asyncio.Transport", self._writer)
            self._writer.begin()
            if self._gate.draining or self.parser.should_upgrade():
                cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._body_bytes += len(body)
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._phase = _Phase.WAITING
        super().on_message_complete()
        if self.cycle.response_complete:
            self._enter(_Phase.IDLE, self._settings.idle_timeout_s)

    def on_response_complete(self) -> None:
        if self._phase is _Phase.LEAVING:
            return
        if self.pipeline:
            self._answering = self.pipeline[-1][0]
        super().on_response_complete()
        # Not so while the rest of a body, or the next request, is arriving already: that phase goes on.
        if self._phase is _Phase.WAITING and self.cycle.response_complete:
            self._enter(_Phase.IDLE, self._settings.idle_timeout_s)

    # --- deadlines

    def _time_phase(self) -> None:
        """After the parser has moved on: several phases may have passed within one piece of data."""
        match self._phase:
            case _Phase.HEAD:
                self._enter(_Phase.HEAD, self._settings.header_timeout_s)
            case _Phase.BODY:
                self.flow.forget_pauses()
                self._enter(_Phase.BODY, self._settings.body_timeout_s)
            case _Phase.WAITING:
                self._read_by = None

    def _enter(self, phase: _Phase, allowed_s: float) -> None:
        self._phase = phase
        self._read_by = self.loop.time() + allowed_s
        self._arm()

    def _arm(self) -> None:
        """One timer a connection. It may ring too early and is then set anew, so that requests need not touch it."""
        due = min((time for time in (self._read_by, self._written_by) if time is not None), default=None)
        if due is None:
            return
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(due, self._ring)

    def _ring(self) -> None:
        self._timer = None
        # Timers may ring a little early by the loop's clock.
        now = self.loop.time() + 0.001
        if self._written_by is not None and self._written_by <= now:
            self._judge_reader()
        if self._read_by is not None and self._read_by <= now:
            self._read_by = None
            self._overdue()
        self._arm()

    def _overdue(self) -> None:
        match self._phase:
            case _Phase.IDLE:
                self._close()
            case _Phase.HEAD if self._head_bytes == 0:
                self._gate.count_refused("header_timeout")
                self._close()  # It never asked for anything: an answer would be the answer to its next request.
            case _Phase.HEAD:
                message = f"The request's headers did not arrive within {self._settings.header_timeout_s:g} s"
                self._refuse(RequestTimeoutError(message), "header_timeout")
            case _Phase.BODY:
                self._judge_sender()
            case _Phase.LEAVING if self.transport.get_write_buffer_size() == 0:
                self.transport.abort()
            case _Phase.LEAVING:
                if self._written_by is None:
                    self._watch_writing()
                self._enter(_Phase.LEAVING, _LINGER_S)

    def _judge_sender(self) -> None:
        """Each window must have brought its share of the body, unless we ourselves kept the client from sending."""
        settings = self._settings
        if not self.flow.was_paused and self._body_bytes < settings.min_rate * settings.body_timeout_s:
            message = f"The body came slower than {settings.min_rate} bytes a second"
            self._refuse(RequestTimeoutError(message), "body_timeout")
            return
        self._body_bytes = 0
        self.flow.forget_pauses()
        self._enter(_Phase.BODY, settings.body_timeout_s)

    def _judge_reader(self) -> None:
        """A client that reads too slowly is cut off: its answer holds memory, and what works for it upstream."""
        self._written_by = None
        waiting_bytes = self.transport.get_write_buffer_size()
        if waiting_bytes == 0:
            return
        if self._unwritten_bytes - waiting_bytes < self._settings.min_rate * self._settings.write_timeout_s:
            self._gate.count_refused("write_timeout")
            # With a reset: closed in any other way, the kernel would go on offering the client what it holds.
            sock = self.transport.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.transport.abort()
            return
        self._watch_writing()

    # --- refusing

    def _fault_of_head(self) -> ProxyError | None:
        """What two servers might read differently is refused: that is how requests are smuggled past one of them."""
        hosts = 0
        for name, value in self.headers:
            if name == b"host":
                hosts += 1
            elif name == b"transfer-encoding" and value.lower() != b"chunked":
                return BadRequestError("The only transfer-encoding taken is `chunked`", code="invalid_http")
        if hosts > 1 or (hosts == 0 and self.parser.get_http_version() == "1.1"):
            return BadRequestError("The request must have one `host` header", code="invalid_http")
        if len(self.headers) > self._settings.max_headers:
            return HeadersTooLargeError(f"The request has more than {self._settings.max_headers} headers")
        # Counted to the byte only where so much came in that it might be too much.
        if max(self._head_bytes, self._piece_bytes) > self._settings.max_header_bytes:
            size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if size > self._settings.max_header_bytes:
                return self._head_too_large()
        return None

    def _head_too_large(self) -> ProxyError:
        return HeadersTooLargeError(f"The request's headers are over {self._settings.max_header_bytes} bytes")

    def _refuse(self, error: ProxyError, reason: str) -> None:
        self._writer.flush()
        self._gate.count_refused("header_size" if isinstance(error, HeadersTooLargeError) else reason)
        if self.pipeline and self._phase is _Phase.BODY:
            # Nobody has begun on the request at fault: those before it are answered, and it is not.
            self.pipeline.popleft()
            self.cycle = self.pipeline[0][0] if self.pipeline else self._answering
            self._phase = _Phase.WAITING
        cycle = self.cycle
        answering = cycle is not None and not cycle.response_complete
        if answering and self._phase is not _Phase.BODY:
            # The fault lies in a request after the one that is being answered.
            cycle.keep_alive = False
            self._deaf = True
            self._phase = _Phase.WAITING
            return
        if not answering and self._phase is not _Phase.BODY:
            self.transport.write(_answer(error))
        elif answering:
            if not self.pipeline and not cycle.response_started:
                self.transport.write(_answer(error))
            # Its application sees the client leave, and can no longer write after what was written here.
            cycle.disconnected = True
            cycle.message_event.set()
        self._phase = _Phase.BODY  # Whatever was refused, more of it may be on its way.
        self.leave()

    def _make_room(self) -> bool:
        """Closes the connection that has been idle longest, if there is one."""
        idle = [
            one
            for one in self.connections
            if isinstance(one, GuardedProtocol) and one._phase is _Phase.IDLE and one._read_by is not None
        ]
        if not idle:
            return False
        min(idle, key=lambda one: one._read_by or 0.0).leave()
        return True


class _Flow(FlowControl):
    """Remembers whether the client was kept from sending."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self.was_paused = False

    def pause_reading(self) -> None:
        self.was_paused = True
        super().pause_reading()

    def forget_pauses(self) -> None:
        self.was_paused = self.read_paused


def _answer(error: ProxyError) -> bytes:
    body = error.body()
    head = {
        "content-type": JSON,
        "content-length": str(len(body)),
        "x-request-id": f"req_{uuid.uuid4().hex}",
        "connection": "close",
    } | error.headers
    lines = [f"HTTP/1.1 {error.http_status} {HTTPStatus(error.http_status).phrase}"]
    lines += [f"{name}: {value}" for name, value in head.items()]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body
