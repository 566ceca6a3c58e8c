"""What the client asked for, resolved into one `Ask`: body, `x-winnow-best-of`, `NAME@N`, the route's defaults.

Only fields that we read are checked; all others go upstream as they came.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from proxy.candidates import Endpoint
from proxy.config import OnReject, RouteSettings, near_miss
from proxy.config_reward import RewardFloor
from proxy.errors import BadRequestError
from proxy.json_limits import DEFAULT_LIMITS, JsonLimits, check_depth, check_text, may_repeat
from proxy.prompts import PromptPart, chat_parts, legacy_parts
from proxy.responses_input import HeldBy, ResponsesBody, held_by, responses_parts
from proxy.routing import ModelName
from proxy.strategies.settings import StrategyName

_DECISIVE = ("model", "n", "stream")
"""Members by which requests are routed, bounded and read: the upstream must not find another value than we did."""

_Model = TypeVar("_Model", bound=BaseModel)
PositiveInt = Annotated[int, Field(ge=1)]


class WinnowField(BaseModel):
    """The `winnow` object of a request body."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    best_of: PositiveInt | None = None
    strategy: StrategyName | None = None
    quorum: PositiveInt | None = None
    min_reward: RewardFloor | None = None
    on_reject: OnReject | None = None
    max_candidates: PositiveInt | None = None
    deadline_s: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    return_candidates: bool | None = None
    reward_model: str | None = None


_NO_WISHES = WinnowField()


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class _Body(BaseModel):
    """The members of OpenAI's request that decide what we do."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    model: str | None = None
    n: PositiveInt | None = None
    best_of: PositiveInt | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    temperature: float | None = None
    seed: int | None = None
    max_tokens: object = None
    echo: bool | None = None
    winnow: WinnowField | None = None


@dataclass(frozen=True, slots=True)
class Ask:
    """One request, understood. `parts` is empty where it merely passes through."""

    endpoint: Endpoint
    body: Mapping[str, Any]
    """For the upstream: without our own fields and the `@N` of the model."""
    raw: bytes | None
    """The body as it came, where nothing of it had to change."""
    model: str | None
    best_of: int
    n: int
    strategy: StrategyName
    quorum: int | None
    """Valid candidates that are enough to judge; None: all are waited for."""
    stream: bool
    include_usage: bool
    seed: int | None
    parts: Sequence[PromptPart]
    echo: bool
    min_reward: RewardFloor | None
    on_reject: OnReject
    max_candidates: int
    deadline_s: float | None
    return_candidates: bool
    reward_model: str | None
    held_by: HeldBy | None = None
    """Why only one candidate is drawn, whatever was asked for; None where nothing stands in the way."""

    @property
    def passes_through(self) -> bool:
        """One upstream call whose answer nobody here needs to read."""
        return not self.parts

    @property
    def may_broadcast(self) -> bool:
        """The winner may be sent while it is still being written, if its strategy comes to know it that early."""
        return self.stream and self.strategy == "speculative" and self.endpoint != "responses" and len(self.parts) == 1

    def encoded(self) -> bytes:
        return self.raw if self.raw is not None else encode(self.body)


def parse_object(raw: bytes, limits: JsonLimits = DEFAULT_LIMITS) -> dict[str, Any]:
    """A JSON object from a request body. Raises `BadRequestError`; so do NaN and lone surrogates."""
    check_text(raw, limits)
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise BadRequestError(f"The body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(body, dict):
        raise BadRequestError(f"The body must be a JSON object, not {type(body).__name__}", code="invalid_json")
    check_depth(raw, body, limits)
    return body


def encode(body: Mapping[str, Any]) -> bytes:
    """Raises `BadRequestError` for what could be read but cannot be written, such as nesting over 254 levels."""
    try:
        return orjson.dumps(body)
    except (orjson.JSONEncodeError, TypeError) as error:
        raise BadRequestError(f"The body cannot be passed on: {error}", code="invalid_json") from error


def parse_ask(
    endpoint: Endpoint,
    raw: bytes,
    body: dict[str, Any],
    headers: Mapping[str, str],
    route: RouteSettings,
    model: ModelName,
) -> Ask:
    """Resolves a request, `raw` and parsed, against its route's defaults. `headers` has lower-case names.

    Raises `BadRequestError`.
    """
    checked = check(_Body, body)
    options = checked.winnow or _NO_WISHES
    _check_fallback(options, route)
    n = checked.n or 1
    if n > 1 and endpoint == "responses":
        raise BadRequestError("The Responses API answers with one response: n must be 1", param="n")
    asked = _asked_best_of(checked, options, headers, model.best_of)
    best_of = _resolve_best_of(asked, n, route)
    floor = options.min_reward if options.min_reward is not None else route.min_reward
    needs_judging = floor is not None or bool(options.return_candidates)
    greedy = checked.temperature == 0
    if best_of > 1 and greedy:
        best_of = n  # Greedy decoding gives the same text again: a second candidate buys nothing.
    plan = _plan(endpoint, body, checked, route, asked=asked, best_of=best_of, needs_judging=needs_judging)
    best_of, parts, held = plan.best_of, plan.parts, plan.held_by
    ours = {key for key in ("best_of", "winnow") if key in body}
    forwarded = {key: value for key, value in body.items() if key not in ours}
    if model.renamed:
        forwarded["model"] = model.name
    if endpoint == "responses" and parts and held is None:
        forwarded["store"] = False  # Losers leave no trace; which ones they are is not known before.
    return Ask(
        endpoint=endpoint,
        body=forwarded,
        raw=None if ours or model.renamed or parts or may_repeat(raw, _DECISIVE) else raw,
        model=model.name,
        best_of=best_of,
        n=n,
        strategy=options.strategy or route.strategy,
        quorum=options.quorum or route.quorum,
        stream=bool(checked.stream),
        include_usage=bool(checked.stream_options and checked.stream_options.include_usage),
        seed=checked.seed,
        parts=parts,
        echo=bool(checked.echo),
        min_reward=floor,
        on_reject=_on_reject(options, route, held),
        max_candidates=_max_candidates(options, route, best_of, only=held is not None or greedy),
        deadline_s=_deadline(options, headers, route),
        return_candidates=bool(options.return_candidates),
        reward_model=options.reward_model,
        held_by=held,
    )


@dataclass(frozen=True, slots=True)
class _Plan:
    best_of: int
    parts: Sequence[PromptPart]
    """Empty: the request merely passes through."""
    held_by: HeldBy | None


def _plan(
    endpoint: Endpoint,
    body: Mapping[str, Any],
    checked: _Body,
    route: RouteSettings,
    *,
    asked: int | None,
    best_of: int,
    needs_judging: bool,
) -> _Plan:
    """How many are drawn for which prompts. Raises `BadRequestError`."""
    n = checked.n or 1
    # Plain `n` on a server that draws no more: the client chooses among the choices itself.
    plain_n = n > 1 and asked is None and route.best_of == 1
    if not needs_judging and (best_of == 1 or plain_n):
        return _Plan(best_of, (), None)
    parts = _parts(endpoint, body, checked, explicit=asked is not None)
    held = _held_by(body, route, parts) if endpoint == "responses" else None
    if held is not None:
        # In the background the answer comes later, by another call.
        return _Plan(1, parts if needs_judging and held != "background" else (), held)
    if len(parts) * best_of > route.max_draws:
        raise BadRequestError(
            f"{len(parts)} prompts with best_of {best_of} are more than {route.max_draws} candidates", param="prompt"
        )
    return _Plan(best_of, parts, None)


def _held_by(body: Mapping[str, Any], route: RouteSettings, parts: Sequence[PromptPart]) -> HeldBy | None:
    held = held_by(body, check(ResponsesBody, body), stores_by_default=route.responses_store == "pass")
    return held if held is not None or parts else "input"


def _on_reject(options: WinnowField, route: RouteSettings, held: HeldBy | None) -> OnReject:
    action = options.on_reject or route.on_reject
    # The fallback would be a second call, where there may be only one.
    return "best" if held is not None and action == "fallback" else action


def requested_model(body: Mapping[str, Any]) -> str | None:
    """The name that decides on the route; `parse_ask` refuses what is no name."""
    model = body.get("model")
    return model if isinstance(model, str) else None


def check(model: type[_Model], body: Mapping[str, Any]) -> _Model:
    """A typed view of `body`. Raises `BadRequestError` naming the first offending field."""
    try:
        return model.model_validate(body)
    except ValidationError as error:
        problems = error.errors(include_input=False, include_url=False, include_context=False)
        problem = problems[0]
        location = _location(problem["loc"])
        path = ".".join(location)
        if problem["type"] == "extra_forbidden":
            known = list(WinnowField.model_fields) if location[:1] == ["winnow"] else list(model.model_fields)
            message = f"Unknown field {path}{near_miss(location[-1], known)}"
        else:
            # A union complains once a branch: all of them together say what would do.
            branches = [one["msg"] for one in problems if _location(one["loc"]) == location]
            message = f"{path}: {' or '.join(dict.fromkeys(branches))}"
        raise BadRequestError(message, param=path) from error


def _location(path: Sequence[int | str]) -> list[str]:
    """Without the branches of unions, which pydantic names in an error's path; a client cannot know them."""
    branches = ("constrained-", "function-", "list[", "dict[")
    parts = [str(part) for part in path]
    return [part for part in parts if part not in ("float", "str") and not part.startswith(branches)]


def _check_fallback(options: WinnowField, route: RouteSettings) -> None:
    if options.on_reject == "fallback" and route.fallback_model is None:
        raise BadRequestError("No fallback model is configured on this server", param="winnow.on_reject")


def _asked_best_of(checked: _Body, options: WinnowField, headers: Mapping[str, str], suffix: int | None) -> int | None:
    if checked.best_of is not None:
        return checked.best_of
    if options.best_of is not None:
        return options.best_of
    header = headers.get("x-winnow-best-of")
    if header is not None:
        number = header.strip()
        if not re.fullmatch(r"[0-9]{1,9}", number):
            raise BadRequestError("The header x-winnow-best-of must be a whole number", param="x-winnow-best-of")
        return int(number)
    return suffix


def _resolve_best_of(asked: int | None, n: int, route: RouteSettings) -> int:
    best_of = max(route.best_of, n) if asked is None else asked
    if best_of < 1:
        raise BadRequestError("best_of must be at least 1", param="best_of")
    if best_of < n:
        raise BadRequestError(f"best_of ({best_of}) must not be less than n ({n})", param="best_of")
    if asked is None and best_of == n and route.best_of == 1:
        return best_of  # Plain `n` of a server that was told to draw no more: the upstream's limit holds.
    if best_of > route.max_best_of:
        field = "best_of" if asked is not None else "n"
        raise BadRequestError(f"{field} ({best_of}) is over this server's limit of {route.max_best_of}", param=field)
    return best_of


def _max_candidates(options: WinnowField, route: RouteSettings, best_of: int, *, only: bool) -> int:
    """`only`: more would be the same again, or may not be drawn."""
    if options.max_candidates is not None and options.max_candidates > route.max_draws:
        raise BadRequestError(
            f"max_candidates ({options.max_candidates}) is over this server's limit of {route.max_draws}",
            param="winnow.max_candidates",
        )
    wanted = options.max_candidates or route.max_candidates or best_of
    return best_of if only else max(wanted, best_of)


def _deadline(options: WinnowField, headers: Mapping[str, str], route: RouteSettings) -> float | None:
    wanted = options.deadline_s or route.deadline_s
    deadlines = [] if wanted is None else [wanted]
    # openai-python says it always, openai-node by another name where a request has a time-out of its own.
    announced = headers.get("x-stainless-read-timeout") or headers.get("x-stainless-timeout", "")
    if announced and re.fullmatch(r"[0-9]{1,7}(\.[0-9]{1,9})?", announced) and float(announced) > 0:
        # A very short time-out is mostly margin: leave half of it to the work.
        deadlines.append(max(float(announced) - route.deadline_margin_s, float(announced) / 2))
    return min(deadlines, default=None)


def _parts(endpoint: Endpoint, body: Mapping[str, Any], checked: _Body, *, explicit: bool) -> Sequence[PromptPart]:
    if endpoint == "chat":
        return chat_parts(body)
    if endpoint == "responses":
        return responses_parts(body)
    scores_prompt = bool(checked.echo) and checked.max_tokens == 0
    return legacy_parts(body, scores_prompt=scores_prompt, explicit=explicit)
