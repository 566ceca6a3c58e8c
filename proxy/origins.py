"""Web pages: which may use this server from a browser, and how those that may not are kept out."""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Mapping
from urllib.parse import urlsplit

from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp

from proxy.errors import ForbiddenError

EXPOSED_HEADERS = (
    "retry-after", "retry-after-ms", "x-request-id", "x-should-retry", "x-winnow-accepted", "x-winnow-best-of",
    "x-winnow-candidates", "x-winnow-completion-id", "x-winnow-cost", "x-winnow-fallback", "x-winnow-held-by",
    "x-winnow-joined", "x-winnow-overhead-ms", "x-winnow-reward", "x-winnow-scored", "x-winnow-strategy",
    "x-winnow-upstream-calls", "x-winnow-upstream-request-id", "x-winnow-usage-estimated",
)  # fmt: skip
"""Of an answer's headers those that a page's script may read."""


class PageGuard:
    """Keeps other sites' pages away from a server whose only protection is that it listens on loopback.

    A browser on the same machine would send their requests there: with the page's `Origin`, or, once the page's
    own name was made to point to 127.0.0.1 (DNS rebinding), with that name as `Host`.
    """

    def __init__(self, allowed: Collection[str]) -> None:
        self._allowed = frozenset(allowed)

    def check(self, headers: Mapping[str, str]) -> None:
        """`headers` has lower-case names. Raises `ForbiddenError`."""
        host = headers.get("host", "")
        if not _is_loopback(host):
            raise ForbiddenError(
                "Without server.api_keys only requests to localhost are served: set keys to allow other host names"
            )
        origin = headers.get("origin")
        if origin is not None and origin not in self._allowed | {f"http://{host}", f"https://{host}"}:
            raise ForbiddenError("A page of another origin may not use this server: allow it in server.cors_origins")


def with_cors(app: ASGIApp, origins: Collection[str]) -> ASGIApp:
    """Pages of `origins` may call `app` and read its answers."""
    return CORSMiddleware(
        app,
        allow_origins=tuple(origins),
        allow_methods=("GET", "POST", "PUT", "PATCH", "DELETE"),
        # Answered with the very names that were asked for: to browsers a literal `*` does not cover `Authorization`.
        allow_headers=("*",),
        expose_headers=EXPOSED_HEADERS,
    )


def _is_loopback(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
        return "@" not in host and (name == "localhost" or ipaddress.ip_address(name).is_loopback)
    except ValueError:
        return False
