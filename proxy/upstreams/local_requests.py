"""What a request asks of the embedded language model: bytes -> `GenerationRequest`. No torch, no tokenizer.

Fields nobody here reads are ignored, as OpenAI-compatible servers do. So are, because the answer stays honest
without them: `tools` with `tool_choice` `auto` or `none` (the model answers in words), `response_format` (the
gateway checks candidates against it), `best_of` (the gateway's business), `user`, `store`, `metadata`. Refused,
because ignoring them would lie: a `tool_choice` that demands a call, `suffix`, message parts that are not text.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Any, Literal, TypeVar

import orjson
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from feedback.records import Message

DEFAULT_LEGACY_MAX_TOKENS = 16
"""OpenAI's default of `/completions`."""
MAX_STOPS = 4
MAX_CANDIDATES_PER_CALL = 1024
"""Prompts × n of one `/completions` call."""
_GREEDY_BELOW = 1e-5
"""Temperatures under this are greedy: dividing by them would overflow and change nothing else."""


class RequestError(Exception):
    """The request cannot be answered; `status`, `param` and `code` go into OpenAI's error envelope."""

    def __init__(
        self,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        status: HTTPStatus = HTTPStatus.BAD_REQUEST,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code
        self.status = status


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How tokens are drawn, and when drawing ends."""

    temperature: float = 1.0
    """0 takes the likeliest token."""
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int | None = None
    """Candidate i of a prompt draws with `seed` + i."""
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None
    """How many alternatives to report a token; 0 for the token's own log-probability alone, None for nothing."""

    @property
    def greedy(self) -> bool:
        return self.temperature < _GREEDY_BELOW


@dataclass(frozen=True, slots=True)
class GenerationRequest:
    """A parsed call. Chat calls have `messages`; legacy ones have `prompts`, each a text or token ids."""

    sampling: SamplingParams
    n: int
    max_tokens: int | None
    """None: the upstream's default."""
    model: str | None
    stream: bool
    include_usage: bool
    messages: tuple[Message, ...] | None = None
    prompts: tuple[str | tuple[int, ...], ...] = ()
    echo: bool = False

    @property
    def chat(self) -> bool:
        return self.messages is not None


def parse_chat(body: bytes) -> GenerationRequest:
    """A `/chat/completions` body. Raises `RequestError`."""
    fields = _parse(_ChatBody, body)
    _refuse_demanded_tools(fields.tool_choice)
    if fields.top_logprobs is not None and not fields.logprobs:
        raise RequestError("'top_logprobs' needs 'logprobs': true", param="top_logprobs")
    top_logprobs = (fields.top_logprobs or 0) if fields.logprobs else None
    limit = fields.max_completion_tokens if fields.max_completion_tokens is not None else fields.max_tokens
    if limit == 0:
        name = "max_tokens" if fields.max_completion_tokens is None else "max_completion_tokens"
        raise RequestError(f"Invalid value for {name!r}: must be at least 1", param=name)
    messages = tuple(_message(i, message) for i, message in enumerate(fields.messages))
    return GenerationRequest(
        **fields.common(top_logprobs),
        max_tokens=limit,
        messages=messages,
    )


def parse_completion(body: bytes) -> GenerationRequest:
    """A legacy `/completions` body. Raises `RequestError`."""
    fields = _parse(_CompletionBody, body)
    if fields.suffix:
        raise RequestError("'suffix' is not supported by this model", param="suffix")
    common = fields.common(fields.logprobs)
    if len(fields.prompt) * common["n"] > MAX_CANDIDATES_PER_CALL:
        raise RequestError(
            f"{len(fields.prompt)} prompts × n={common['n']} is more than {MAX_CANDIDATES_PER_CALL} completions; "
            "split the call",
            param="prompt",
        )
    limit = DEFAULT_LEGACY_MAX_TOKENS if fields.max_tokens is None else fields.max_tokens
    return GenerationRequest(**common, max_tokens=limit, prompts=fields.prompt, echo=bool(fields.echo))


def _stops(value: object) -> list[str]:
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, list) or not all(isinstance(stop, str) for stop in value):
        raise ValueError("must be a string or a list of strings")
    if len(value) > MAX_STOPS:
        raise ValueError(f"takes at most {MAX_STOPS} strings")
    if "" in value:
        raise ValueError("must not hold an empty string")
    return value


def _prompts(value: object) -> tuple[str | tuple[int, ...], ...]:
    """OpenAI's four shapes: a text, texts, token ids, lists of token ids."""

    def is_tokens(item: object) -> bool:
        return isinstance(item, list) and bool(item) and all(type(token) is int for token in item)

    if isinstance(value, str):
        return (value,)
    if is_tokens(value):
        value = [value]
    if isinstance(value, list) and value:
        if all(isinstance(item, str) for item in value):
            return tuple(value)
        if all(is_tokens(item) for item in value):
            return tuple(tuple(item) for item in value)
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of such lists; none empty")


def _bias(value: dict[str, float]) -> dict[int, float]:
    if any(not -100 <= bias <= 100 for bias in value.values()):
        raise ValueError("biases lie between -100 and 100")
    if any(not token.isascii() or not token.isdigit() or len(token) > 9 for token in value):
        raise ValueError("keys are token ids")
    return {int(token): bias for token, bias in value.items()}


_Bounded = Annotated[int, Field(ge=0)]


class _StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)

    include_usage: bool | None = None


class _SamplingBody(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=128)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[str, float], AfterValidator(_bias)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Any, BeforeValidator(lambda value: None if value is None else _stops(value))] = None
    max_tokens: _Bounded | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None

    def common(self, top_logprobs: int | None) -> dict[str, Any]:
        """The arguments of `GenerationRequest` that both endpoints share; null counts as absent."""
        sampling = SamplingParams(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            # Validated into integer keys, which the annotation before validation cannot say.
            logit_bias=self.logit_bias or None,  # type: ignore[arg-type]
            seed=self.seed,
            stop=tuple(self.stop or ()),
            top_logprobs=top_logprobs,
        )
        options = self.stream_options
        return {
            "sampling": sampling,
            "n": self.n or 1,
            "model": self.model,
            "stream": bool(self.stream),
            "include_usage": bool(self.stream and options and options.include_usage),
        }


class _MessageBody(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]


class _ChatBody(_SamplingBody):
    messages: Annotated[list[_MessageBody], Field(min_length=1)]
    max_completion_tokens: _Bounded | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    tool_choice: Any = None


class _CompletionBody(_SamplingBody):
    prompt: Annotated[Any, BeforeValidator(_prompts)]
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = None


_Body = TypeVar("_Body", bound=BaseModel)


def _parse(kind: type[_Body], body: bytes) -> _Body:
    try:
        members = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise RequestError(f"The body is not valid JSON: {error}", code="invalid_json") from error
    if not isinstance(members, dict):
        raise RequestError("The body must be a JSON object")
    try:
        return kind.model_validate(members)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        param = _path(first["loc"])
        if first["type"] == "missing":
            raise RequestError(f"Missing required parameter: {param!r}", param=param) from error
        problem = first["msg"].removeprefix("Value error, ")
        raise RequestError(f"Invalid value for {param!r}: {problem}", param=param) from error


def _path(location: tuple[int | str, ...]) -> str:
    path = ""
    for step in location:
        path += f"[{step}]" if isinstance(step, int) else f".{step}" if path else step
    return path


def _message(position: int, message: _MessageBody) -> Message:
    """The message with its content as one string, and `developer`, which older templates do not know, as `system`."""
    extra = message.model_extra or {}
    where = f"messages[{position}].content"
    content = extra.get("content")
    if isinstance(content, list):
        content = "\n".join(_part(f"{where}[{i}]", part) for i, part in enumerate(content))
    elif content is not None and not isinstance(content, str):
        raise RequestError(f"Invalid value for {where!r}: must be a string, a list of parts or null", param=where)
    if content is None and message.role != "assistant":
        raise RequestError(f"Invalid value for {where!r}: only assistant messages may be without content", param=where)
    role = "system" if message.role == "developer" else message.role
    rendered: Message = {"role": role, "content": content or ""}
    return rendered


def _part(where: str, part: object) -> str:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if isinstance(part, Mapping) and kind in ("text", "refusal") and isinstance(text := part.get(kind), str):
        return text
    raise RequestError(f"Invalid value for {where!r}: this model reads text parts only, not {kind!r}", param=where)


def _refuse_demanded_tools(tool_choice: object) -> None:
    if tool_choice not in (None, "auto", "none"):
        raise RequestError("This model cannot call tools: 'tool_choice' may be 'auto' or 'none'", param="tool_choice")
