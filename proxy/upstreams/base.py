"""The seam between the proxy and the places completions come from.

An upstream answers OpenAI-shaped requests: a path and a JSON body go in, a status, headers and bytes
(or a stream of bytes) come out. `hosted.HostedUpstream` sends them over HTTP, `local.LocalUpstream`
answers them with a model in this process. Everything above this seam is the same for both.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Protocol


class UpstreamError(Exception):
    """No whole answer came. The message is for people, clients among them.

    `reason` is one of `connect`, `timeout`, `broken`, `too_large`, `encoding` (packed in a way that we cannot undo),
    `authentication` (the upstream refused the key that the proxy itself holds), `circuit_open` and `busy` (nothing was
    sent), `closed`.
    An answer with an error status is not this; it is an `UpstreamResponse` like any other.
    """

    def __init__(self, reason: str, message: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.reason = reason
        self.retry_after_s = retry_after_s
        """When another try may help, where that is known."""


@dataclass(frozen=True, slots=True)
class UpstreamCall:
    """One request to an upstream. `path` is below the base URL and starts with a slash: `/chat/completions`."""

    method: str
    path: str
    body: bytes | AsyncIterator[bytes] | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    """Already filtered for forwarding; the upstream adds its own key where one is configured."""
    query: str = ""
    model: str | None = None
    """That the body asks for, where it is known: for traces."""
    limited: bool = True
    """The answer may be held in memory, so that its size has a limit. False: it is only passed on."""


class UpstreamResponse(Protocol):
    """An answer whose body may still be arriving. Whoever got it must close it; closing early cancels the work."""

    @property
    def status(self) -> int: ...

    @property
    def headers(self) -> Mapping[str, str]:
        """Case-insensitive."""

    async def read(self) -> bytes:
        """The whole body. Raises `UpstreamError` when it breaks off."""

    def stream(self) -> AsyncIterator[bytes]:
        """The body as it arrives, in pieces of any size. Raises `UpstreamError` when it breaks off."""

    async def aclose(self) -> None: ...


class Upstream(Protocol):
    """A place completions come from. Opened and closed by the app's lifespan; calls may run at once."""

    @property
    def name(self) -> str:
        """From configuration: used as a metric label."""

    async def open(self) -> None: ...

    async def send(self, call: UpstreamCall) -> UpstreamResponse:
        """Returns when status and headers are known, whatever the status.

        Raises `UpstreamError` when no answer came (connection, time-out). Cancelling the call cancels the work.
        """

    async def ready(self) -> bool:
        """Can answer now. Never raises."""

    async def aclose(self) -> None: ...
