"""Which headers cross the proxy. Allow-lists both ways: what is not named stays on its side."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

from starlette.types import Scope

from proxy.keys import CREDENTIAL_HEADERS

Headers = list[tuple[bytes, bytes]]

_TO_UPSTREAM = CREDENTIAL_HEADERS | {
    "accept", "content-type", "idempotency-key", "if-match", "if-none-match", "openai-beta", "openai-organization",
    "openai-project", "range", "traceparent", "tracestate", "user-agent", "x-client-request-id",
}  # fmt: skip
_FROM_UPSTREAM = frozenset({
    "accept-ranges", "cache-control", "content-disposition", "content-range", "content-type", "etag", "last-modified",
    "location", "retry-after", "retry-after-ms", "www-authenticate", "x-should-retry",
})  # fmt: skip
_FROM_UPSTREAM_PREFIXES = ("openai-", "x-ratelimit-")
UPSTREAM_REQUEST_ID = "x-winnow-upstream-request-id"


def request_headers(scope: Scope) -> dict[str, str]:
    """Lower-case names; of a repeated header the last."""
    return {name.decode("latin-1"): _text(value) for name, value in scope["headers"]}


def to_upstream(
    headers: Mapping[str, str], also: Iterable[str] = (), *, keep_credentials: bool = True
) -> dict[str, str]:
    allowed = _allowed(tuple(also), keep_credentials)
    return {name: value for name, value in headers.items() if name in allowed}


@functools.lru_cache(maxsize=64)
def _allowed(also: tuple[str, ...], keep_credentials: bool) -> frozenset[str]:
    """The same for every request of a route."""
    allowed = _TO_UPSTREAM.union(name.lower() for name in also)
    # They opened our door; where no upstream key is set they still must not travel on.
    return allowed if keep_credentials else allowed - CREDENTIAL_HEADERS


def for_generation(headers: Mapping[str, str]) -> dict[str, str]:
    """For a body that we wrote ourselves, whose answer we read ourselves."""
    dropped = ("accept", "content-type", "range", "if-match", "if-none-match", "idempotency-key")
    kept = {name: value for name, value in headers.items() if name not in dropped}
    return kept | {"content-type": "application/json", "accept": "*/*"}


def relayed(headers: Mapping[str, str]) -> Headers:
    """The upstream's headers for the client, where its body goes through as it is."""
    lowered = {name.lower(): value for name, value in headers.items()}
    kept = from_upstream(lowered)
    if "content-length" in lowered and "content-encoding" not in lowered and "transfer-encoding" not in lowered:
        kept["content-length"] = lowered["content-length"]
    return raw(kept)


def from_upstream(lowered: Mapping[str, str]) -> dict[str, str]:
    kept = {
        name: value
        for name, value in lowered.items()
        if name in _FROM_UPSTREAM or name.startswith(_FROM_UPSTREAM_PREFIXES)
    }
    if "x-request-id" in lowered:
        kept[UPSTREAM_REQUEST_ID] = lowered["x-request-id"]
    return kept


def of_winner(winner: Mapping[str, str], others: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The winner's call's headers, with the least remaining of every rate limit over all calls."""
    kept = {name: value for name, value in from_upstream(winner).items() if name not in ("content-type", "etag")}
    for name in [name for name in kept if name.startswith("x-ratelimit-remaining")]:
        values = [headers[name] for headers in others if headers.get(name, "").isdigit()]
        if values:
            kept[name] = min(values, key=int)
    return kept


def raw(headers: Mapping[str, str]) -> Headers:
    """Bytes that an upstream sent, and aiohttp read, become what they were."""
    return [(name.encode("latin-1"), value.encode("utf-8", "surrogateescape")) for name, value in headers.items()]


def _text(value: bytes) -> str:
    # aiohttp writes headers in UTF-8: read so, words of any language go out as they came.
    try:
        return value.decode()
    except UnicodeDecodeError:
        return value.decode("latin-1")
