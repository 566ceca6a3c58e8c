"""When a route's upstream fails, the routes that stand in for it, one after the other."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

from proxy.candidates import CallFailure
from proxy.errors import UpstreamFailedError
from proxy.routing import Route

_Answer = TypeVar("_Answer")

_ELSEWHERE_STATUS = (402, 408, 429)
_ELSEWHERE_REASONS = frozenset({
    "connect", "timeout", "broken", "malformed", "encoding", "error", "authentication", "circuit_open", "busy",
})  # fmt: skip


def may_help(failure: CallFailure) -> bool:
    """Another upstream may do what this one could not. What is wrong with the request is wrong everywhere."""
    if failure.status is not None:
        return failure.status >= 500 or failure.status in _ELSEWHERE_STATUS
    return failure.reason in _ELSEWHERE_REASONS


async def first_to_answer(
    routes: Sequence[Route], attempt: Callable[[Route], Awaitable[_Answer]]
) -> tuple[_Answer, Route]:
    """The answer of the first route that has one, and that route. Raises what the first of all raised, if none has."""
    failed: UpstreamFailedError | None = None
    for route in routes:
        try:
            return await attempt(route), route
        except UpstreamFailedError as error:
            failed = failed or error
            if not may_help(error.failure):
                break
    assert failed is not None, "there is one route at least"
    raise failed
