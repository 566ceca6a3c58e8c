"""Where offline commands get completions from: an OpenAI-compatible server or a model in this process.

Both stand behind the proxy's own seam, so that what is learnt of `n`, refusals and time-outs there holds here too.
"""

from __future__ import annotations

import asyncio
import itertools
import os
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from http import HTTPStatus
from typing import TYPE_CHECKING, Any

import orjson

from feedback.records import Messages
from reward.bases import DEFAULT_BASE
from training.sampling import Drawn, GenerationError, Sampling
from winnow.console import FAILED, CommandError
from winnow.version import __version__

if TYPE_CHECKING:
    from proxy.candidates import Call, CallFailure, Candidate
    from proxy.drawing import Drawer
    from proxy.upstreams.base import Upstream
    from proxy.upstreams.paced import PacedUpstream

KEY_VARIABLE = "OPENAI_API_KEY"
_HEADERS = {
    "accept": "application/json",
    "content-type": "application/json",
    "user-agent": f"winnow/{__version__}",
}
_HOPELESS_STATUS = (401, 402, 404)
"""No key, no money, no such model: the next prompt would hear the same."""
_MAX_N = 128
"""The largest `n` of the embedded model."""
_FOREVER_S = 10 * 365 * 24 * 3600.0
_FIRST_BACKOFF_S = 0.5
"""Most that the first retry waits where the upstream names no time; doubled from retry to retry."""
_BEST_OF_HEADER = "x-winnow-best-of"
"""Of a winnow proxy: its `n` answers are the best ones of one drawing, not drawn one by one."""


@dataclass(frozen=True, slots=True)
class Origin:
    """What completions come from: a server where `base_url` is given, else a model loaded into this process."""

    base_url: str | None = None
    model: str | None = None
    """A server's model name, or a folder, hub id or `package:NAME`; None takes the first that is listed, or the
    embedded default."""
    key_variable: str = KEY_VARIABLE
    """The environment variable that holds the server's key; unset, none is sent."""
    device: str = "auto"
    dtype: str = "auto"
    trust_remote_code: bool = False

    @property
    def known_model(self) -> str | None:
        """The model's name, where nobody has to be asked for it."""
        return self.model or (DEFAULT_BASE if self.base_url is None else None)


def origin_of(name: str, defaults: Origin, key_variable: str = KEY_VARIABLE) -> Origin:
    """Of a server as `URL` or `URL#MODEL`, or of what a local model is called."""
    if name.startswith(("http://", "https://")):
        url, _, model = name.partition("#")
        return replace(defaults, base_url=url, model=model or None, key_variable=key_variable)
    return replace(defaults, model=name)


@dataclass(frozen=True, slots=True)
class Pace:
    """How hard an upstream is asked."""

    at_once: int = 8
    """Calls at once; of a local model, prompts."""
    per_minute: float | None = None
    """Calls begun in a minute."""
    max_retries: int = 6
    """Of a prompt's failed calls, one after the other."""
    max_wait_s: float = 300.0
    """Longest wait before a retry, the upstream's own `retry-after` included."""
    timeout_s: float = 600.0
    """For one call."""


@asynccontextmanager
async def completions_of(origin: Origin, sampling: Sampling, pace: Pace) -> AsyncIterator[Completer]:
    """Opens the place; a local model is loaded here. Raises `CommandError` where that cannot be done."""
    from prometheus_client import CollectorRegistry

    from proxy.config import UpstreamSettings
    from proxy.drawing import Drawer
    from proxy.metrics import ProxyMetrics
    from proxy.upstreams.base import UpstreamError
    from proxy.upstreams.capabilities import Capabilities
    from proxy.upstreams.guarded import GuardedUpstream
    from proxy.upstreams.paced import PacedUpstream
    from reward.errors import RewardError

    try:
        settings = UpstreamSettings(
            url=origin.base_url,
            max_connections=pace.at_once,
            # Prompts at once are bounded, and each one's calls by what is asked of it.
            max_waiting=max(1024, 2 * pace.at_once * sampling.count),
            first_byte_timeout_s=pace.timeout_s,
            total_timeout_s=pace.timeout_s,
            # A job in bulk waits for an upstream that is down; it has nobody to answer meanwhile.
            circuit_failure_ratio=0.0,
        )
    except ValueError as error:
        raise CommandError(f"{origin.base_url}: no base URL; write it as https://host/v1") from error
    paced = PacedUpstream(_upstream(origin, settings, pace), pace.per_minute, asyncio.get_running_loop().time)
    # A call may wait as long as it takes for a place: with many completions a prompt, or few calls a minute, that is
    # longer than any call may run.
    patient = settings.model_copy(update={"first_byte_timeout_s": _FOREVER_S})
    guarded = GuardedUpstream(paced, patient, ProxyMetrics(CollectorRegistry(), __version__))
    drawer = Drawer(guarded, Capabilities(settings.n_mode))
    async with AsyncExitStack() as opened:
        opened.push_async_callback(guarded.aclose)
        try:
            await guarded.open()
            model = await _model_name(origin, guarded)
        except (RewardError, ValueError) as error:
            raise CommandError(str(error)) from error
        except UpstreamError as error:
            raise CommandError(f"{origin.base_url}: {error}", FAILED) from error
        yield Completer(model, drawer, paced, sampling, pace, origin.base_url is None)


def _upstream(origin: Origin, settings: Any, pace: Pace) -> Upstream:
    if origin.base_url is not None:
        from pydantic import SecretStr

        from proxy.upstreams.hosted import HostedUpstream

        key = os.environ.get(origin.key_variable)
        return HostedUpstream(settings.model_copy(update={"key": SecretStr(key) if key else None}))
    from proxy.upstreams.local import LocalUpstream

    name = origin.model or DEFAULT_BASE
    return LocalUpstream(
        name,
        served_name=name,
        device=origin.device,
        dtype=origin.dtype,
        max_queue=max(64, pace.at_once),
        trust_remote_code=origin.trust_remote_code,
    )


async def _model_name(origin: Origin, upstream: Upstream) -> str:
    """The one asked for, or the first that is listed. Raises `CommandError`, `UpstreamError`."""
    if origin.known_model is not None:
        return origin.known_model
    from proxy.upstreams.base import UpstreamCall

    response = await upstream.send(UpstreamCall("GET", "/models"))
    try:
        status, body = response.status, await response.read()
    finally:
        await response.aclose()
    try:
        listed = orjson.loads(body)["data"]
        return str(listed[0]["id"])
    except (orjson.JSONDecodeError, KeyError, TypeError, IndexError) as error:
        raise CommandError(
            f"{origin.base_url}/models answered {status} and lists no model: name one with --model", FAILED
        ) from error


@dataclass(slots=True)
class Completer:
    """A `training.sampling.Generate` over one upstream, with the retries of a job that has time."""

    model: str
    """As it is asked for; of a local model the name that it was loaded by."""
    _drawer: Drawer
    _paced: PacedUpstream
    _sampling: Sampling
    _pace: Pace
    _is_local: bool
    num_tokens: int = 0
    """Completion tokens so far, as far as the upstream told."""
    _one_by_one: bool = False

    async def __call__(self, prompt: Messages, count: int, seed: int | None) -> list[Drawn]:
        """So many completions; those that failed are drawn again, the others kept. Raises `GenerationError`."""
        drawn: dict[int, Drawn] = {}
        for attempt in itertools.count():
            missing = [index for index in range(count) if index not in drawn]
            candidates = await self._draw(prompt, missing, seed)
            failures = []
            for index, candidate in zip(missing, candidates, strict=True):
                if candidate.failure is None:
                    own_seed = None if seed is None else seed + index
                    drawn[index] = Drawn([candidate.completion()], candidate.finish_reason, own_seed)
                else:
                    failures.append(candidate.failure)
            if not failures:
                break
            await self._wait(failures[0], attempt)
        return [drawn[index] for index in range(count)]

    async def _draw(self, prompt: Messages, indices: Sequence[int], seed: int | None) -> Sequence[Candidate]:
        """A candidate for each index, failed ones among them."""
        body = self._body(prompt)
        whole = list(indices) == list(range(len(indices)))
        if seed is not None and self._is_local and whole and len(indices) <= _MAX_N:
            # The embedded engine gives the i-th of `n` the seed + i by itself, and reads the prompt once for all.
            return await self._drawn(body | {"seed": seed}, None, range(len(indices)))
        if seed is not None or self._one_by_one:
            drawing = (self._drawn(body, seed, range(index, index + 1)) for index in indices)
            return [one for drawn in await asyncio.gather(*drawing) for one in drawn]
        candidates = await self._drawn(body, None, range(len(indices)))
        if any(one.shares_call and _BEST_OF_HEADER in one.call.headers for one in candidates):
            self._one_by_one = True
            return await self._draw(prompt, indices, seed)
        return candidates

    async def _drawn(self, body: Mapping[str, Any], seed: int | None, indices: range) -> Sequence[Candidate]:
        from proxy.drawing import Job

        job = Job("chat", self.model, body, _HEADERS, seed, stream=False)
        draw = await self._drawer.draw(job, len(indices), indices.start, None)
        self.num_tokens += sum(_completion_tokens(call) for call in draw.calls)
        return draw.candidates

    def _body(self, prompt: Messages) -> dict[str, Any]:
        sampling = self._sampling
        members = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop": list(sampling.stop) or None,
        }
        given = {name: value for name, value in members.items() if value is not None}
        return {"model": self.model, "messages": list(prompt)} | given | dict(sampling.body)

    async def _wait(self, failure: CallFailure, attempt: int) -> None:
        """Until a failed call may be made again. Raises `GenerationError` where that would not help."""
        from proxy.upstreams.retries import out_of_money, retry_after_s, retry_reason

        hopeless = failure.status in _HOPELESS_STATUS or failure.reason == "authentication" or out_of_money(failure)
        if hopeless or retry_reason(failure) is None:
            raise GenerationError(failure.message, hopeless=hopeless)
        if attempt >= self._pace.max_retries:
            raise GenerationError(f"{failure.message} (after {attempt} retries)")
        asked_s = retry_after_s(failure.headers)
        if asked_s is not None and asked_s > self._pace.max_wait_s:
            raise GenerationError(f"{failure.message} (it asks to wait {asked_s:.0f} s)")
        backoff_s = min(_FIRST_BACKOFF_S * 2**attempt, self._pace.max_wait_s)
        wait_s = asked_s or random.uniform(backoff_s / 2, backoff_s)  # noqa: S311 - nothing secret about a delay
        if failure.status == HTTPStatus.TOO_MANY_REQUESTS:
            self._paced.hold(wait_s)
        await asyncio.sleep(wait_s)


def _completion_tokens(call: Call) -> int:
    tokens = (call.usage or {}).get("completion_tokens")
    return tokens if isinstance(tokens, int) else 0
