"""Errors that become answers: each knows its status, and all speak OpenAI's envelope.

ProxyError
├── BadRequestError        400  the request is not one we can serve; `param` names the field
├── AuthenticationError    401  no key, or one that is not ours
├── ForbiddenError         403  a web page tried to use a server that is open to this machine only
├── NotFoundError          404  no such path, or no such route
├── MethodNotAllowedError  405  the path exists, the method does not
├── RequestTimeoutError    408  headers or body came too slowly
├── BodyTooLargeError      413  the body is over `server.max_body_bytes`
├── RejectedError          422  no candidate reached `min_reward` and `on_reject` is `error`
├── HeadersTooLargeError   431  over `server.max_header_bytes` or `server.max_headers`
├── OverloadedError        429  over `server.max_in_flight` or `max_buffered_body_bytes`; carries `retry-after`
├── QuotaError             429  over one of the key's limits; carries `retry-after`
├── InternalError          500  a bug of ours; details go to the log only
├── UpstreamFailedError    any  every candidate failed: the upstream's own status, body and `retry-after`
├── FeedbackUnavailableError 503  the feedback store cannot be reached
├── WinnerLostError        502  the winner's stream broke off while it was relayed; too late for any other
├── RewardUnavailableError 503  the reward model failed and `on_reward_failure` is `error`
├── TooManyConnectionsError 503 over `server.max_connections`
├── ShuttingDownError      503  the server stops before the answer was ready; carries `retry-after`
└── DeadlineError          504  the deadline passed with too few answers
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import orjson

from proxy.candidates import CallFailure

JSON = "application/json"


def envelope(message: str, type_: str, code: str | None, param: str | None = None) -> dict[str, Any]:
    """All four members are required by OpenAI's schema; `param` and `code` may be null."""
    return {"error": {"message": message, "type": type_, "param": param, "code": code}}


class ProxyError(Exception):
    """Ends a request with an error answer. The message reaches the client: no keys, no internals."""

    status: ClassVar[int] = 500
    type: ClassVar[str] = "server_error"
    code: ClassVar[str | None] = None

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.param = param
        self.error_code = code or self.code
        self.headers = dict(headers or {})

    @property
    def http_status(self) -> int:
        return self.status

    def body(self) -> bytes:
        return orjson.dumps(envelope(str(self), self.type, self.error_code, self.param))


class BadRequestError(ProxyError):
    status = 400
    type = "invalid_request_error"


class AuthenticationError(ProxyError):
    status = 401
    type = "invalid_request_error"
    code = "invalid_api_key"


class ForbiddenError(ProxyError):
    status = 403
    type = "invalid_request_error"
    code = "forbidden_origin"


class NotFoundError(ProxyError):
    status = 404
    type = "invalid_request_error"
    code = "not_found"


class MethodNotAllowedError(ProxyError):
    status = 405
    type = "invalid_request_error"
    code = "method_not_allowed"


class RequestTimeoutError(ProxyError):
    status = 408
    type = "timeout_error"
    code = "request_timeout"


class BodyTooLargeError(ProxyError):
    status = 413
    type = "invalid_request_error"
    code = "body_too_large"


class RejectedError(ProxyError):
    status = 422
    type = "rejected_by_reward_model"
    code = "rejected_by_reward_model"


class HeadersTooLargeError(ProxyError):
    status = 431
    type = "invalid_request_error"
    code = "headers_too_large"


class OverloadedError(ProxyError):
    status = 429
    type = "rate_limit_error"
    code = "max_in_flight"


class QuotaError(ProxyError):
    status = 429
    type = "rate_limit_error"
    code = "rate_limit_exceeded"


class InternalError(ProxyError):
    code = "internal_error"


class FeedbackUnavailableError(ProxyError):
    status = 503
    type = "server_error"
    code = "feedback_store_unavailable"


class RewardUnavailableError(ProxyError):
    status = 503
    type = "server_error"
    code = "reward_model_unavailable"


class TooManyConnectionsError(ProxyError):
    status = 503
    type = "server_error"
    code = "max_connections"

    def __init__(self, message: str) -> None:
        super().__init__(message, headers={"retry-after": "1"})


class ShuttingDownError(ProxyError):
    status = 503
    type = "server_error"
    code = "shutting_down"

    def __init__(self) -> None:
        super().__init__("This server is stopping. Try again, on another one", headers={"retry-after": "1"})


class DeadlineError(ProxyError):
    status = 504
    type = "timeout_error"
    code = "deadline_exceeded"


class WinnerLostError(ProxyError):
    status = 502
    type = "upstream_error"
    code = "upstream_broken"


class UpstreamFailedError(ProxyError):
    """The upstream's own error, kept as it came where it already is an OpenAI envelope."""

    type = "upstream_error"
    _STATUS_OF_REASON: ClassVar[Mapping[str, int]] = {"timeout": 504, "deadline": 504, "circuit_open": 503, "busy": 503}
    _OF_ITS_BODY: ClassVar[tuple[str, ...]] = ("content-type", "content-disposition", "content-range", "etag")

    def __init__(self, failure: CallFailure) -> None:
        headers = {name: value for name, value in failure.headers.items() if name not in self._OF_ITS_BODY}
        super().__init__(failure.message, code=f"upstream_{failure.reason}", headers=headers)
        self.failure = failure

    @property
    def http_status(self) -> int:
        if self.failure.status is not None and self.failure.status >= 400:
            return self.failure.status
        return self._STATUS_OF_REASON.get(self.failure.reason, 502)

    def body(self) -> bytes:
        return self.failure.body if _is_envelope(self.failure.body) else super().body()


def error_for_status(status: int, detail: str) -> ProxyError:
    """The error for an exception that the web framework raised itself."""
    if status == 404:
        return NotFoundError(detail)
    if status == 405:
        return MethodNotAllowedError(detail)
    return BadRequestError(detail) if status < 500 else InternalError(detail)


def _is_envelope(body: bytes) -> bool:
    try:
        parsed = orjson.loads(body)
    except orjson.JSONDecodeError:
        return False
    return isinstance(parsed, dict) and isinstance(parsed.get("error"), dict)
