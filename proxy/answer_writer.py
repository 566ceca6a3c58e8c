"""What the answers on one connection are written to, in uvicorn's place for the connection's transport."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_INTERIM = b"HTTP/1.1 100 "
"""What may go out before an answer."""


class AnswerWriter:
    """Sends the head of an answer and what follows at once as one.

    uvicorn writes them one after the other, and each costs a call to the kernel: a tenth of what the server spends on a
    plain answer. A head that nothing follows goes out alone, at the end of the loop's turn.
    """

    __slots__ = ("_begins", "_held", "_loop", "_write", "close", "is_closing")

    def __init__(
        self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop, close: Callable[[], None]
    ) -> None:
        self._loop = loop
        self._write = transport.write
        self._begins = False
        self._held = b""
        self.is_closing = transport.is_closing
        self.close = close

    def begin(self) -> None:
        """An answer's head is what comes next.

        With requests in a pipeline it may be more of the answer before: that then waits as a head does, no longer.
        """
        self._begins = True

    def write(self, data: bytes) -> None:
        if self._held:
            data, self._held = self._held + data, b""
        elif self._begins and not data.startswith(_INTERIM):
            self._begins = False
            self._held = data
            self._loop.call_soon(self.flush)
            return
        self._write(data)

    def flush(self) -> None:
        """To be called before anything is written beside this, and before the connection is closed."""
        if self._held:
            held, self._held = self._held, b""
            if not self.is_closing():  # the client may have hung up meanwhile
                self._write(held)
