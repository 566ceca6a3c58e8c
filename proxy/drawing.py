"""Drawing candidates: one upstream call with `n`, or as many calls as candidates, or one after the other.

A candidate's own failure is a value; only cancellation ends a draw early.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from proxy.candidates import ENDPOINT_PATHS, Call, CallEnd, CallFailure, Candidate, Draw, Endpoint
from proxy.drafts import Draft
from proxy.ledger import Ledger
from proxy.patience import Patience, Waiting
from proxy.recording import (
    StreamRecorder,
    choice_text,
    is_event_stream,
    parse_answer,
    payloads_of,
    status_failure,
)
from proxy.request import encode
from proxy.upstreams.base import UpstreamCall, UpstreamError, UpstreamResponse
from proxy.upstreams.capabilities import Capabilities
from proxy.upstreams.guarded import GuardedUpstream
from proxy.upstreams.retries import RetryBudget, Siblings

DEADLINE_PASSED = CallFailure("deadline", "Not complete when the deadline passed")
NOT_WAITED_FOR = CallFailure("quorum", "Not complete when the others were enough")
_WAITS_FOR_ALL = Patience(None, 0.0, 0.0, 1, lambda candidate: True)
Arrival = Callable[[Candidate], None]
"""Told of a candidate that is whole, or failed, while others are still being drawn."""
_UNPAID = frozenset({"connect", "closed", "authentication"})
"""Reasons of an `UpstreamError` after which the upstream cannot have worked for us, nor bill it."""
_REFUSING_STATUS = (400, 422)
"""What an upstream answers that does not take `n`. All others (keys, limits, faults) say nothing about `n`."""
_TRIAL_S = 0.25
"""How long the other calls wait to hear whether the first is refused."""


@dataclass(frozen=True, slots=True)
class Job:
    """What is drawn: one prompt's body, without `n`."""

    endpoint: Endpoint
    model: str | None
    body: Mapping[str, Any]
    headers: Mapping[str, str]
    seed: int | None
    stream: bool
    retries: RetryBudget = field(default_factory=RetryBudget)
    """The request's own, shared by all that is drawn for it. An empty one, if none is given."""
    query: str = ""
    """Of the client's URL: some providers name their API's version there."""
    ledger: Ledger = field(default_factory=Ledger)
    """Where every call is entered as it ends, however it ends."""

    @property
    def takes_n(self) -> bool:
        """With a seed each candidate needs its own; recorded streams are drawn one candidate a stream."""
        return self.endpoint != "responses" and self.seed is None and not self.stream


class Drawer:
    """Draws from one upstream. Shared by all requests; holds nothing of any of them."""

    def __init__(self, upstream: GuardedUpstream, capabilities: Capabilities) -> None:
        self.upstream = upstream
        self._capabilities = capabilities

    async def draw(
        self,
        job: Job,
        count: int,
        first_index: int,
        deadline: float | None,
        patience: Patience = _WAITS_FOR_ALL,
        on_arrival: Arrival = lambda candidate: None,
    ) -> Draw:
        """`count` candidates with the indices from `first_index` on, in order.

        `deadline` is in the loop's time: calls still running then are cancelled and count as failed, unless `patience`
        outlasts it. So do those that `patience` gives up. Cancelling the draw cancels all its calls.
        """
        key = (self.upstream.name, job.model, job.endpoint)
        together = job.takes_n and count > 1 and self._capabilities.worth_asking(key, count)
        if not together or patience.quorum is not None:
            return await self._parallel(job, count, first_index, deadline, patience, on_arrival)
        first = await self._with_n(job, count, first_index, None if patience.outlasts_deadline else deadline)
        failure = first.candidates[0].failure
        received = sum(candidate.failure is None for candidate in first.candidates)
        if failure is None:
            self._capabilities.learn(key, count, received)
            if received == count:
                return first
            for candidate in first.candidates:
                on_arrival(candidate)
            patience = replace(patience, least=patience.least - received)
            rest = await self._parallel(job, count - received, first_index + received, deadline, patience, on_arrival)
            return _joined(first, rest)
        if failure.status not in _REFUSING_STATUS or self._capabilities.proven(key, count):
            return first
        # The controlled comparison: the same body, only without `n`.
        trial = _Trial()
        second = await self._parallel(job, count, first_index, deadline, patience, on_arrival, trial)
        if trial.succeeded:
            self._capabilities.learn(key, count, 0)
        return replace(_joined(first, second), candidates=second.candidates)

    async def draw_one(self, job: Job, body: bytes, draft: Draft, deadline: float | None) -> Candidate:
        """One candidate by a call of its own, with one of `bodies`; `draft` shows what has come of it.

        `deadline` only keeps retries from being waited for past it. Cancelling ends the upstream call.
        """
        return (await self._call(job, body, draft, 1, deadline))[0]

    async def _parallel(
        self,
        job: Job,
        count: int,
        first_index: int,
        deadline: float | None,
        patience: Patience,
        on_arrival: Arrival,
        trial: _Trial | None = None,
    ) -> Draw:
        """With a `trial` the others wait a moment for the first, and are not asked for where it is refused."""
        # Written before anything starts: what cannot be written is the request's fault, not a candidate's.
        bodies = bodies_of(job, count, first_index)
        drafts = [Draft(first_index + position) for position in range(count)]
        drawn: list[Candidate | None] = [None] * count
        tasks: list[asyncio.Task[None]] = []
        num_begun = 0
        why_missing = DEADLINE_PASSED
        ends_at, outlasted = (None, deadline) if patience.outlasts_deadline else (deadline, None)
        if is_past(ends_at):
            return Draw([draft.given_up(DEADLINE_PASSED) for draft in drafts], [], 0)

        def give_up() -> None:
            nonlocal why_missing
            why_missing = DEADLINE_PASSED if waiting.is_overdue else NOT_WAITED_FOR
            for task in tasks:
                task.cancel()

        async def draw_one(position: int) -> None:
            nonlocal num_begun
            if trial is not None and position > 0 and await trial.is_refused():
                return
            num_begun += 1
            one = (await self._call(job, bodies[position], drafts[position], 1, deadline, siblings))[0]
            drawn[position] = one
            if trial is not None and position == 0:
                trial.ended(one.failure)
            waiting.arrived(one)
            on_arrival(one)

        siblings = Siblings(max(job.retries.needed, (count + 1) // 2))
        waiting = Waiting(patience, count, give_up, outlasted)
        try:
            async with asyncio.timeout_at(ends_at), asyncio.TaskGroup() as group:
                tasks.extend(group.create_task(draw_one(position)) for position in range(count))
        except TimeoutError:
            pass  # What is there competes; what is missing failed.
        finally:
            waiting.close()
        candidates = [one or draft.given_up(why_missing) for one, draft in zip(drawn, drafts, strict=True)]
        if num_begun == 1 < count and candidates[0].failure is not None:
            return _failed_alike(candidates[0], count, first_index)
        return Draw(candidates, [candidate.call for candidate in candidates], num_begun)

    async def _with_n(self, job: Job, count: int, first_index: int, deadline: float | None) -> Draw:
        body = _body(job, first_index, count)
        draft = Draft(first_index)
        if is_past(deadline):
            return replace(_failed_alike(draft.given_up(DEADLINE_PASSED), count, first_index), calls=[], num_calls=0)
        try:
            async with asyncio.timeout_at(deadline):
                candidates = await self._call(job, body, draft, count, deadline)
        except TimeoutError:
            candidates = [draft.given_up(DEADLINE_PASSED)]
        if candidates[0].failure is not None:
            return _failed_alike(candidates[0], count, first_index)
        return Draw(candidates, [candidates[0].call], 1)

    async def _call(
        self, job: Job, body: bytes, draft: Draft, most: int, deadline: float | None, siblings: Siblings | None = None
    ) -> list[Candidate]:
        """One upstream call, with its retries: `most` candidates or fewer, or one that failed."""
        tried = await self.upstream.retrier.run(
            lambda: self._attempt(job, body, draft, most),
            lambda candidates: candidates[0].failure,
            job.retries,
            deadline=deadline,
            siblings=siblings,
        )
        first = tried.outcome[0]
        failure = first.failure and self.upstream.retrier.for_client(first.failure, job.retries)
        if failure is first.failure:
            return tried.outcome
        return [replace(first, failure=failure)]

    async def _attempt(self, job: Job, body: bytes, draft: Draft, most: int) -> list[Candidate]:
        index, recorder = draft.index, draft.start(self.upstream.name, job.endpoint)
        try:
            place = await self.upstream.place()
        except UpstreamError as error:
            # Nothing was sent: nothing for the books.
            refused = _cut_off(job, "refused", recorder, most, time.perf_counter())
            return [Candidate(index, refused, CallFailure.of(error))]
        started = time.perf_counter()
        try:
            call = UpstreamCall("POST", ENDPOINT_PATHS[job.endpoint], body, job.headers, job.query, job.model)
            response = await place.send(call)
            try:
                candidates = await self._read(job, draft, most, response, recorder, started)
            finally:
                await response.aclose()
            job.ledger.enter(candidates[0].call)
            return candidates
        except UpstreamError as error:
            lost = _cut_off(job, "refused" if error.reason in _UNPAID else "lost", recorder, most, started)
            return [Candidate(index, job.ledger.enter(lost), CallFailure.of(error))]
        except asyncio.CancelledError:
            draft.call = job.ledger.enter(_cut_off(job, draft.ending, recorder, most, started))
            raise

    async def _read(
        self, job: Job, draft: Draft, most: int, response: UpstreamResponse, recorder: StreamRecorder, started: float
    ) -> list[Candidate]:
        index = draft.index
        headers = {name.lower(): value for name, value in response.headers.items()}
        if job.stream and response.status == 200 and is_event_stream(headers):
            await recorder.record(draft.watched(response.stream(), headers))
            call = replace(_cut_off(job, "answered", recorder, 1, started), usage=recorder.usage, headers=headers)
            candidate = recorder.candidate(index, call)
            broken = replace(call, end="lost") if candidate.failure is not None else call
            return [replace(candidate, call=broken)]
        body = await response.read()
        ended = functools.partial(
            Call,
            time.perf_counter() - started,
            headers=headers,
            model=job.model,
            request=job.body,
            num_candidates=most,
        )
        if response.status != 200:
            return [Candidate(index, ended(end="refused"), status_failure(response, body, self.upstream.name))]
        answer = parse_answer(body, self.upstream.name, job.endpoint)
        if isinstance(answer, CallFailure):
            end: CallEnd = "refused" if answer.reason == "error" else "lost"
            return [Candidate(index, ended(end=end), answer)]
        choices = answer.choices[:most]
        received = "".join(map(choice_text, choices)) if answer.usage is None else ""
        call = ended(usage=answer.usage, received=received)
        candidates = [
            Candidate(index + offset, call, answer=answer.frame, choice=choice, shares_call=len(choices) > 1)
            for offset, choice in enumerate(choices)
        ]
        if job.stream:
            return [replace(one, chunks=payloads_of(one, job.endpoint)) for one in candidates]
        return candidates


class _Trial:
    """Of several calls the first, which tells whether the body they share is refused."""

    def __init__(self) -> None:
        self._over = asyncio.Event()
        self._refused = False
        self.succeeded = False

    def ended(self, failure: CallFailure | None) -> None:
        self.succeeded = failure is None
        self._refused = failure is not None and failure.status in _REFUSING_STATUS
        self._over.set()

    async def is_refused(self) -> bool:
        """Waits for the first, but not long: a refusal is quick, and an answer may not be."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_TRIAL_S):
                await self._over.wait()
        return self._refused


def _failed_alike(one: Candidate, count: int, first_index: int) -> Draw:
    """The failure of one call stands for all candidates."""
    return Draw([replace(one, index=first_index + offset) for offset in range(count)], [one.call], 1)


def is_past(deadline: float | None) -> bool:
    """In the loop's time."""
    return deadline is not None and asyncio.get_running_loop().time() >= deadline


def _cut_off(job: Job, end: CallEnd, recorder: StreamRecorder, most: int, started: float) -> Call:
    """A call as it stands now, by what was asked and what came so far."""
    return Call(
        time.perf_counter() - started,
        model=job.model,
        request=job.body,
        received=recorder.received,
        end=end,
        num_candidates=most,
    )


def bodies_of(job: Job, count: int, first_index: int = 0) -> list[bytes]:
    """One a candidate, for calls of their own. Raises `BadRequestError`."""
    if job.seed is None:
        return [_body(job, first_index, None)] * count
    return [_body(job, first_index + position, None) for position in range(count)]


def _body(job: Job, index: int, n: int | None) -> bytes:
    """Raises `BadRequestError`."""
    body = {field: value for field, value in job.body.items() if field != "n"}
    if n is not None:
        body["n"] = n
    if job.seed is not None:
        body["seed"] = job.seed + index
    if job.stream:
        body["stream"] = True
    if job.endpoint == "responses":
        return encode(body)  # Usage comes with every last event; `stream_options` has no such member.
    if job.stream:
        # Asked for always, so that the sum over all candidates is exact; hidden where nobody wants it.
        options = body.get("stream_options")
        body["stream_options"] = (options if isinstance(options, dict) else {}) | {"include_usage": True}
    else:
        body.pop("stream", None)
        body.pop("stream_options", None)
    return encode(body)


def _joined(first: Draw, second: Draw) -> Draw:
    return Draw(
        [*first.candidates, *second.candidates],
        [*first.calls, *second.calls],
        first.num_calls + second.num_calls,
        earlier=first,
    )
