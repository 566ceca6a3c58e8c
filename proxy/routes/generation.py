"""The story of one generating request: admit, read, parse, draw and judge, answer. All endpoints share it."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from starlette.types import Receive, Scope, Send

from proxy import response
from proxy.accounting import account, account_relayed, account_unfinished, winner_tokens
from proxy.admission import client_left, while_client_waits
from proxy.broadcast import Broadcast
from proxy.candidate_sets import candidate_sets
from proxy.candidates import ENDPOINT_PATHS, Call, CallEnd, Endpoint
from proxy.config import LOCAL
from proxy.config_reward import RewardFloor
from proxy.drawing import Job
from proxy.errors import BadRequestError, DeadlineError, ProxyError
from proxy.exchange import Exchange, exchange_of
from proxy.facts import Facts
from proxy.fallback import first_to_answer
from proxy.gateway import Gateway
from proxy.headers import for_generation
from proxy.joining import Linger, Sharing, StillAtWorkError
from proxy.judging import Judge
from proxy.ledger import Tokens, settle
from proxy.metering import Meter
from proxy.prompts import PromptPart
from proxy.relay import Answer, Relay, WholeAnswer
from proxy.request import Ask, parse_ask, parse_object, requested_model
from proxy.response import Result
from proxy.routing import Route
from proxy.strategies.contest import Terms
from proxy.strategies.outcome import Outcome, rejection
from proxy.strategies.registry import STRATEGIES
from proxy.streaming import plain_result, plain_rhythm, stream_result, streamed_rhythm
from proxy.upstreams.base import UpstreamCall
from proxy.upstreams.retries import RetryBudget
from proxy.validity import rules_for
from reward.scorer import Scorer

_Answer = TypeVar("_Answer")


@dataclass(frozen=True, slots=True)
class GenerationEndpoint:
    """An ASGI application for one path."""

    endpoint: Endpoint

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        started = time.perf_counter()
        exchange = exchange_of(scope)
        gateway = exchange.gateway
        headers = exchange.headers
        with gateway.admission.admit() as place:
            raw_body = await place.read_body(receive, headers)
            body = parse_object(raw_body, gateway.settings.server.json_limits)
            route, model = gateway.routing.resolve(requested_model(body))
            exchange.facts.route = route.name
            ask = parse_ask(self.endpoint, raw_body, body, headers, route.settings, model)
            query = scope.get("query_string", b"").decode("latin-1")
            path, forwarded = scope["path"], gateway.forward_headers
            sharing = None if ask.stream else gateway.joining.sharing(path, query, headers, raw_body, forwarded)
            if sharing is None or not sharing.joins:
                exchange.client.quota.admit_candidates(ask.best_of * max(1, len(ask.parts)))
            facts = exchange.facts
            facts.model, facts.stream, facts.best_of = ask.model, ask.stream, ask.best_of
            facts.request_bytes = len(raw_body)
            needed = max(route.settings.min_candidates, ask.n)
            # What may stay one call only is tried once: a second attempt could leave a second trace.
            max_retries = route.settings.max_retries if ask.held_by is None else 0
            retries = RetryBudget.of(max_retries, headers, needed)
            work = _Request(exchange, route, ask, headers, query, started, retries, sharing)
            await while_client_waits(client_left(receive), work.answer(send))


@dataclass(frozen=True, slots=True)
class _Request:
    exchange: Exchange
    route: Route
    ask: Ask
    client_headers: Mapping[str, str]
    query: str
    started: float
    """Of `time.perf_counter`."""
    retries: RetryBudget
    sharing: Sharing | None
    """None: nobody can join it, nor it anybody."""
    stand_in: str | None = None
    """The route that is asked in place of `route`: what is learnt of the answers is learnt of that one."""

    @property
    def gateway(self) -> Gateway:
        return self.exchange.gateway

    @property
    def facts(self) -> Facts:
        return self.exchange.facts

    async def answer(self, send: Send) -> None:
        if self.ask.passes_through:
            await self._relay(send)
            return
        server = self.gateway.settings.server
        if not self.ask.stream:
            await plain_result(self._shared(self._result), plain_rhythm(server), send, self._joined)
            return
        broadcast = Broadcast(self.ask, response.new_completion_id()) if self.ask.may_broadcast else None
        await stream_result(self._result(broadcast), self.ask.endpoint, streamed_rhythm(server), send, broadcast)

    async def _relay(self, send: Send) -> None:
        answer = await self._shared(self._relayed)
        extra = {"x-winnow-best-of": "1", "x-winnow-upstream-calls": str(answer.num_attempts)} | self._joined
        if self.ask.held_by is not None:
            extra["x-winnow-held-by"] = self.ask.held_by
        if answer.fallback is not None:
            extra[response.FALLBACK_HEADER] = answer.fallback
        self.facts.num_calls = answer.num_attempts
        upstream_s = await answer.send(send, extra)
        self.gateway.metrics.overhead.observe(max(0.0, time.perf_counter() - self.started - upstream_s))

    async def _relayed(self) -> Answer:
        answer, fallback = await self._first_to_answer(lambda request: request._relayed_here())
        return answer if fallback is None else replace(answer, fallback=fallback)

    async def _relayed_here(self) -> Answer:
        call = UpstreamCall(
            "POST",
            ENDPOINT_PATHS[self.ask.endpoint],
            self.ask.encoded(),
            self._forwarded() | {"content-type": "application/json"},
            self.query,
            self.ask.model,
        )
        relay = Relay(self.route.upstream, self.retries, "stream" if self.ask.stream else "object")
        answer = await relay.answer(call, None if self._outlasts_deadline else self._left_s)
        if isinstance(answer, WholeAnswer):
            self._account_relayed(answer.usage, 0, "answered", answer.upstream_s)
            return answer
        return replace(answer, meter=Meter(self._account_metered))

    def _account_metered(self, meter: Meter, end: CallEnd, upstream_s: float) -> None:
        usage = meter.usage()
        self._account_relayed(usage, 0 if usage is not None else meter.num_events, end, upstream_s)

    def _account_relayed(
        self, usage: Mapping[str, Any] | None, num_events: int, end: CallEnd, upstream_s: float
    ) -> None:
        call = Call(upstream_s, usage, model=self.ask.model, request=self.ask.body, num_events=num_events, end=end)
        account_relayed(call, self.facts, self.gateway.metrics, self.gateway.prices)
        self._charge()

    async def _first_to_answer(self, attempt: Callable[[_Request], Awaitable[_Answer]]) -> tuple[_Answer, str | None]:
        """An answer by this route or, where its upstream fails, by one that stands in, whose name comes along."""
        names = self.route.settings.fallback_routes if self.ask.held_by is None else ()
        if not names:
            return await attempt(self), None
        named = [self.gateway.routing.named(name) for name in names]
        others = [route for route in named if route is not None and route is not self.route]
        answer, route = await first_to_answer([self.route, *others], lambda route: attempt(self._on(route)))
        if route is self.route:
            return answer, None
        self.gateway.metrics.fallbacks.labels(self.route.name, route.name).inc()
        return answer, route.name

    def _on(self, other: Route) -> _Request:
        """The same request, asked of another route's upstream for another model. How to choose stays as it was."""
        if other is self.route:
            return self
        model = other.model or self.ask.model
        ask = replace(self.ask, model=model, body=dict(self.ask.body) | {"model": model}, raw=None)
        route = replace(
            self.route, upstream=other.upstream, drawer=other.drawer, model=other.model,
            forward_headers=other.forward_headers,
        )  # fmt: skip
        return replace(self, ask=ask, route=route, stand_in=other.name)

    def _forwarded(self) -> dict[str, str]:
        return self.gateway.forwarded(self.client_headers, self.route)

    @property
    def _left_s(self) -> float | None:
        """Seconds to the deadline."""
        return self.ask.deadline_s and max(0.0, self.ask.deadline_s - (time.perf_counter() - self.started))

    @property
    def _outlasts_deadline(self) -> bool:
        """The client is told when its deadline passes, and may come again for what is at work.

        A race ends with it all the same: it is over streams, of which all but the best are cancelled by then.
        """
        lingers = self.sharing is not None and self.gateway.settings.server.deadline_linger_s > 0
        return lingers and (self.ask.passes_through or self.ask.strategy != "speculative")

    @property
    def _joined(self) -> dict[str, str]:
        return {"x-winnow-joined": "true"} if self.sharing is not None and self.sharing.joins else {}

    async def _shared(self, work: Callable[[], Coroutine[Any, Any, _Answer]]) -> _Answer:
        """What the work brings, or what the same work for the same client brings that runs already."""
        if self.sharing is None:
            return await work()
        if self.sharing.joins:
            self.gateway.metrics.requests_joined.labels(self.route.name).inc()
        server = self.gateway.settings.server
        linger = Linger(server.linger_s, server.deadline_linger_s)
        try:
            return await self.sharing.answer(work, linger, self._left_s if self._outlasts_deadline else None)
        except StillAtWorkError as error:
            # It goes on for a while: a retry of this client joins it.
            raise DeadlineError(f"There was no answer within {self.ask.deadline_s:g} s") from error

    async def _result(self, broadcast: Broadcast | None = None) -> Result:
        scorer = self.gateway.scorer(self.ask.reward_model, "winnow.reward_model", self.route.scorer)
        try:
            outcomes, fallback = await self._first_to_answer(
                lambda request: request._outcomes(request._terms(scorer, broadcast))
            )
        except BaseException:  # cancellation too: what was drawn was paid for
            account_unfinished(self.facts, self.gateway.metrics, self.gateway.prices)
            self._charge()
            raise
        result = Result(
            ask=self.ask,
            outcomes=outcomes,
            reward_model=scorer.name if scorer is not None else None,
            refusal=self.route.settings.refusal,
            completion_id=broadcast.completion_id if broadcast is not None else response.new_completion_id(),
            elapsed_s=time.perf_counter() - self.started,
            bill=settle(self.facts.ledger.calls, self.gateway.prices),
            winner_tokens=sum((winner_tokens(outcome) for outcome in outcomes), Tokens()),
            fallback=fallback,
        )
        account(result, self.facts, self.gateway.metrics)
        self._charge()
        if self.gateway.recorder is not None and self.route.settings.log_candidates:
            self.gateway.recorder.record(*candidate_sets(result, self.facts))
        for outcome in outcomes:
            if outcome.action == "error":
                raise rejection(outcome, _resolve_floor(self.ask.min_reward, scorer))
        return result

    def _charge(self) -> None:
        """Before the answer goes out: a client that asks again at once meets what it has spent."""
        bill, client = self.facts.bill, self.exchange.client
        if bill is None:
            return
        tokens = bill.tokens.prompt + bill.tokens.completion
        client.quota.charge(tokens, bill.cost)
        if client.name is not None:
            self.gateway.metrics.spent_by(client.name, tokens, bill.cost)

    def _terms(self, scorer: Scorer | None, broadcast: Broadcast | None) -> Terms:
        route, histories = self.route.settings, self.gateway.histories
        learnt_of = self.stand_in or self.route.name
        judge = Judge(
            scorer,
            rules_for(self.ask.endpoint, self.ask.body),
            route.on_reward_failure,
            strips_echo=self.ask.echo,
            early=route.score_early,
            # The embedded model computes on the same device: it would only be slowed down.
            expects=route.score_early and self.route.upstream.name != LOCAL,
        )
        return Terms(
            ask=self.ask,
            route=route,
            drawer=self.route.drawer,
            judge=judge,
            history=histories.rewards(learnt_of, scorer.name if scorer is not None else ""),
            durations=histories.durations(learnt_of),
            min_reward=_resolve_floor(self.ask.min_reward, scorer),
            started_at=asyncio.get_running_loop().time() - (time.perf_counter() - self.started),
            outlasts_deadline=self._outlasts_deadline,
            broadcast=broadcast,
        )

    async def _outcomes(self, terms: Terms) -> list[Outcome]:
        """One outcome a prompt, in order; the first prompt to fail fails the request and ends the others."""
        run, parts = STRATEGIES[self.ask.strategy], self.ask.parts
        if len(parts) == 1:
            return [await run(terms, parts[0], self._job(parts[0]))]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(run(terms, part, self._job(part))) for part in parts]
        except* ProxyError as failures:
            raise _first(failures) from failures
        return [task.result() for task in tasks]

    def _job(self, part: PromptPart) -> Job:
        body = self.ask.body if part.text is None else dict(self.ask.body) | {"prompt": part.text}
        return Job(
            endpoint=self.ask.endpoint,
            model=self.ask.model,
            body=body,
            headers=for_generation(self._forwarded()),
            seed=self.ask.seed,
            stream=self.ask.stream,
            query=self.query,
            retries=self.retries,
            ledger=self.facts.ledger,
        )


def _resolve_floor(floor: RewardFloor | None, scorer: Scorer | None) -> float | None:
    """`p20` into a reward. Raises `BadRequestError` where the reward model has no reference completions."""
    if not isinstance(floor, str):
        return floor
    if scorer is None:
        return None  # What happens without a reward model is `on_reward_failure`'s to say.
    reward = scorer.reward_at_percentile(float(floor.removeprefix("p")))
    if reward is None:
        raise BadRequestError(
            f"The reward model {scorer.name} has no reference completions, so that {floor} says nothing; give a number",
            param="winnow.min_reward",
        )
    return reward


def _first(failures: BaseExceptionGroup[ProxyError]) -> ProxyError:
    found: BaseException = failures
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    assert isinstance(found, ProxyError)
    return found
