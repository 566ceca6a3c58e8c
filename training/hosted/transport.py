"""Calls to a fine-tuning service, all through the `openai` client: its retries, its limits, its errors mapped once.

Reading is repeated by the client itself. What makes something, an upload or a job, is tried once at a time, since a
try that failed may have succeeded over there: `made_once` looks before it tries again.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai

from training.hosted.options import HostedOptions
from training.hosted.providers import ProviderError

FIRST_PAUSE_S = 0.5
LONGEST_PAUSE_S = 30.0
"""Between two tries, where the service does not say how long to wait."""
LONGEST_WAIT_S = 300.0
"""The longest `retry-after` that is waited for."""
MOST_LISTED = 10_000
"""Files or jobs looked through for one of ours, newest first."""

_OPENAI_ONLY = ("OpenAI-Organization", "OpenAI-Project")


class Unfinished(ProviderError):
    """A call that made nothing we know of, and may be tried again after `pause_s` seconds (None: as we like).

    With `doubtful` it may have been done all the same: an answer that was lost, an error from the midst of the work.
    """

    def __init__(self, message: str, *, doubtful: bool, pause_s: float | None = None) -> None:
        super().__init__(message)
        self.doubtful = doubtful
        self.pause_s = pause_s


class NotThere(ProviderError):
    """What was asked for does not exist (404)."""


@dataclass(frozen=True, slots=True)
class Calls:
    """A client of one service. `json` and `upload` are for the shapes that the library has no names for."""

    client: openai.OpenAI
    key: str = field(repr=False)

    @classmethod
    @contextmanager
    def to(cls, url: str, key: str, options: HostedOptions) -> Iterator[Calls]:
        """Closes its connections when the block ends."""
        # The organisation and project of the environment are not for others to know.
        hidden: Any = {} if options.provider == "openai" else {name: openai.Omit() for name in _OPENAI_ONLY}
        with openai.OpenAI(
            base_url=url,
            api_key=key,
            max_retries=options.max_tries - 1,
            timeout=options.timeout_s,
            default_headers=hidden,
        ) as client:
            yield cls(client, key)

    @property
    def once(self) -> openai.OpenAI:
        """The client without retries, for what makes something."""
        return self.client.with_options(max_retries=0)

    def get(self, path: str, query: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """A JSON object. Raises `ProviderError`."""
        with self.telling(f"GET {path}"):
            options: Any = {"params": dict(query)} if query else {}
            return _object(self.client.get(path, cast_to=object, options=options), path)

    def post(
        self, path: str, body: Mapping[str, Any], query: Mapping[str, Any] | None = None, *, repeatable: bool = False
    ) -> dict[str, Any]:
        """A JSON object; in one try, unless it does no harm twice. Raises `Unfinished` or `ProviderError`."""
        with self.telling(f"POST {path}"):
            options: Any = {"params": dict(query)} if query else {}
            client = self.client if repeatable else self.once
            return _object(client.post(path, cast_to=object, body=dict(body), options=options), path)

    def upload(self, path: str, file: Path, name: str, fields: Mapping[str, str]) -> dict[str, Any]:
        """A multipart upload, in one try. Raises `Unfinished` or `ProviderError`."""
        with self.telling(f"POST {path}"), file.open("rb") as opened:
            answer = self.once.post(
                path,
                cast_to=object,
                body=dict(fields),
                files=[("file", (name, opened, "application/jsonl"))],
                options={"headers": {"Content-Type": "multipart/form-data"}},
            )
            return _object(answer, path)

    @contextmanager
    def telling(self, call: str) -> Iterator[None]:
        """Maps the library's errors, without the key that some services repeat in theirs."""
        try:
            yield
        except openai.APIStatusError as error:
            raise self._refusal(call, error) from error
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            reason = self._without_key(f"{type(cause).__name__}: {cause}".rstrip(": "))
            message = f"{call} at {self.client.base_url} got no answer: {reason}"
            raise Unfinished(message, doubtful=True) from error
        except openai.OpenAIError as error:
            raise ProviderError(f"{call}: {self._without_key(str(error))}") from error

    def _refusal(self, call: str, error: openai.APIStatusError) -> ProviderError:
        message = self._without_key(f"{call} was answered {error.status_code}: {_said(error)}")
        if error.status_code == 404:
            return NotThere(message)
        pause_s = _retry_after(error)
        if error.status_code == 429:
            # Refused at the door. But a quota that is used up is a 429 too, and no waiting helps.
            if error.code == "insufficient_quota":
                return ProviderError(message)
            return Unfinished(message, doubtful=False, pause_s=pause_s)
        if error.status_code in (408, 409) or error.status_code >= 500:
            return Unfinished(message, doubtful=True, pause_s=pause_s)
        return ProviderError(message)

    def _without_key(self, text: str) -> str:
        return text.replace(self.key, "***")


def made_once(
    make: Callable[[], str],
    find: Callable[[], str | None],
    *,
    doubtful: bool,
    max_tries: int,
    wait: Callable[[float], None] = time.sleep,
) -> str:
    """What `make` makes, or what an earlier try of it has made: `find` looks for that whenever there is a doubt.

    With `doubtful` an earlier process may have tried. Raises `ProviderError`; nothing is swallowed but tries that
    were followed by a better one.
    """
    for tried in range(1, max_tries + 1):
        if doubtful and (found := find()) is not None:
            return found
        try:
            return make()
        except Unfinished as error:
            if tried == max_tries or (error.pause_s or 0.0) > LONGEST_WAIT_S:
                # The last one may have succeeded over there as well.
                found = find() if error.doubtful else None
                if found is not None:
                    return found
                raise
            doubtful = doubtful or error.doubtful
            wait(_pause_s(tried) if error.pause_s is None else error.pause_s)
    raise AssertionError("the last try returns or raises")


def _pause_s(tried: int) -> float:
    """Doubling, with up to a quarter less by chance, so that clients that failed together do not return together."""
    return float(min(FIRST_PAUSE_S * 2 ** (tried - 1), LONGEST_PAUSE_S) * (1 - 0.25 * random.random()))  # noqa: S311


def _retry_after(error: openai.APIStatusError) -> float | None:
    headers = error.response.headers
    for name, scale in (("retry-after-ms", 1e-3), ("retry-after", 1.0)):
        try:
            seconds = float(headers.get(name, "")) * scale
        except ValueError:
            continue
        if 0 <= seconds < float("inf"):
            return seconds
    return None


def _said(error: openai.APIStatusError) -> str:
    """The service's words: OpenAI's envelope, or the `message` or `detail` of others."""
    body = error.body
    if isinstance(body, Mapping):
        inner = body.get("error", body)
        for holder in (inner, body):
            if isinstance(holder, Mapping):
                for member in ("message", "detail"):
                    if isinstance(holder.get(member), str):
                        return str(holder[member])
        if isinstance(inner, str):
            return inner
    return str(body) if body else "without a word"


def _object(answer: object, path: str) -> dict[str, Any]:
    if not isinstance(answer, dict):
        raise ProviderError(f"{path} was answered with something that is no JSON object: is the base URL right?")
    return answer
