"""The other side of `protocols.py`: asking a scoring service elsewhere, in the shape it speaks. Pure; no I/O.

| dialect    | asks                                               | of                                    |
| ---------- | -------------------------------------------------- | ------------------------------------- |
| `winnow`   | `/score`                                           | `winnow reward serve`, `winnow serve` |
| `openrlhf` | the address itself, with `query` and `prompts`     | OpenRLHF's `serve_rm` and its likes   |
| `vllm`     | `/classify` of text; no template: `/pooling` of messages | vLLM                            |
| `tei`      | `/predict` of text; no template: of pairs          | text-embeddings-inference             |

Raw scores are asked for wherever a service can be told: a sigmoid would press the best answers together.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

from feedback.records import Messages
from reward.errors import InputError, ScoringError
from reward.normalisation import Normalisation
from reward.rendering import any_of, broken_up, content_text

DialectName = Literal["winnow", "openrlhf", "vllm", "tei"]


@dataclass(frozen=True, slots=True)
class Request:
    """One HTTP POST, of JSON."""

    path: str
    """Below the service's address; empty for the address itself."""
    body: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class RemoteScore:
    """What a service said of one completion. None: it does not say."""

    raw_reward: float
    reward: float | None = None
    percentile: float | None = None
    truncated: bool = False
    completion_tokens: int = 0
    std: float | None = None
    objectives: Mapping[str, float] | None = None


class Template(Protocol):
    """A chat template without a tokenizer."""

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        """Raises `InputError`."""


class Dialect(Protocol):
    @property
    def normalises(self) -> bool:
        """Rewards come on the scale of reference completions."""

    def requests(self, prompt: Messages, completions: Sequence[Messages]) -> list[Request]:
        """What to send; the answers, in order, make up the scores. Raises `InputError`."""

    def scores(self, answers: Sequence[Any], count: int) -> list[RemoteScore]:
        """One a completion. Raises `ScoringError` for anything that is not one finite number each."""

    def reference_request(self) -> Request | None:
        """Asks for the rewards of reference completions; None where the service knows none."""

    def reference_scale(self, answer: Any) -> Normalisation | None:
        """From the answer to that. Raises `ScoringError`."""


def dialect(name: DialectName, model: str | None, template: Template | None) -> Dialect:
    """`model`: its name there, where a service has several. Raises ValueError for a template that is missing."""
    match name:
        case "winnow":
            return _Winnow(model)
        case "openrlhf":
            if template is None:
                raise ValueError("the protocol openrlhf sends text: name the chat template to make it with")
            return _OpenRLHF(template)
        case "vllm":
            return _VLLM(model, template)
        case "tei":
            return _TEI(template)


@dataclass(frozen=True, slots=True)
class _Winnow:
    model: str | None
    normalises: bool = True

    def requests(self, prompt: Messages, completions: Sequence[Messages]) -> list[Request]:
        body: dict[str, Any] = {"prompt": list(prompt), "completions": [list(one) for one in completions]}
        return [Request("/score", body | ({} if self.model is None else {"reward_model": self.model}))]

    def scores(self, answers: Sequence[Any], count: int) -> list[RemoteScore]:
        rows = _rows(_member(answers[0], "scores"), count)
        return [
            RemoteScore(
                raw_reward=_number(_member(row, "raw_reward")),
                reward=_number(_member(row, "reward")),
                percentile=None if row.get("percentile") is None else _number(row["percentile"]),
                truncated=row.get("truncated") is True,
                std=None if row.get("std") is None else _number(row["std"]),
                objectives=_numbers(row.get("objectives")),
            )
            for row in sorted(rows, key=lambda row: int(_number(_member(row, "index"))))
        ]

    def reference_request(self) -> Request | None:
        probe = {"prompt": "x", "completions": ["x"], "return_references": True}
        return Request("/score", probe | ({} if self.model is None else {"reward_model": self.model}))

    def reference_scale(self, answer: Any) -> Normalisation | None:
        quantiles = answer.get("references") if isinstance(answer, dict) else None
        if quantiles is None:
            return None
        try:
            return Normalisation(quantiles=tuple(_number(one) for one in _rows(quantiles, None)))
        except ValueError as error:
            raise ScoringError(f"the scoring service's references are not in order: {error}") from error


class _WithoutReferences:
    """For services that only score."""

    __slots__ = ()

    def reference_request(self) -> Request | None:
        return None

    def reference_scale(self, answer: Any) -> Normalisation | None:
        return None


@dataclass(frozen=True, slots=True)
class _OpenRLHF(_WithoutReferences):
    template: Template
    normalises: bool = False

    def requests(self, prompt: Messages, completions: Sequence[Messages]) -> list[Request]:
        asked = self.template.render(prompt, add_generation_prompt=True)
        texts = [self.template.render([*prompt, *one], add_generation_prompt=False) for one in completions]
        return [Request("", {"query": texts, "prompts": [asked] * len(texts), "labels": [""] * len(texts)})]

    def scores(self, answers: Sequence[Any], count: int) -> list[RemoteScore]:
        return [RemoteScore(_number(one)) for one in _rows(_member(answers[0], "rewards"), count)]


@dataclass(frozen=True, slots=True)
class _VLLM(_WithoutReferences):
    model: str | None
    template: Template | None
    normalises: bool = False

    def requests(self, prompt: Messages, completions: Sequence[Messages]) -> list[Request]:
        # Newer and older versions call the same switch by different names; each overlooks the other's.
        common: dict[str, Any] = {"activation": False, "use_activation": False}
        common |= {} if self.model is None else {"model": self.model}
        if self.template is None:
            talks = [[*prompt, *one] for one in completions]
            return [Request("/pooling", common | {"messages": talk}) for talk in talks]
        texts = [self.template.render([*prompt, *one], add_generation_prompt=False) for one in completions]
        return [Request("/classify", common | {"input": texts, "add_special_tokens": False})]

    def scores(self, answers: Sequence[Any], count: int) -> list[RemoteScore]:
        rows = [row for answer in answers for row in _rows(_member(answer, "data"), None)]
        member = "data" if self.template is None else "probs"
        return [RemoteScore(_number(_last(_member(row, member)))) for row in _rows(rows, count)]


@dataclass(frozen=True, slots=True)
class _TEI(_WithoutReferences):
    template: Template | None
    normalises: bool = False

    def requests(self, prompt: Messages, completions: Sequence[Messages]) -> list[Request]:
        return [
            # Refused rather than cut silently, which is its default.
            Request("/predict", {"inputs": self._inputs(prompt, completions), "raw_scores": True, "truncate": False})
        ]

    def scores(self, answers: Sequence[Any], count: int) -> list[RemoteScore]:
        return [RemoteScore(_number(_member(_last(row), "score"))) for row in _rows(answers[0], count)]

    def _inputs(self, prompt: Messages, completions: Sequence[Messages]) -> list[list[str]]:
        if self.template is not None:
            talks = [[*prompt, *one] for one in completions]
            return [[self.template.render(talk, add_generation_prompt=False)] for talk in talks]
        asked = "\n\n".join(content_text(message) for message in prompt)
        return [[asked, "\n\n".join(content_text(message) for message in one)] for one in completions]


_MARKS = re.compile(r"<\|[^<>|\s]{1,60}\|>|<｜[^<>｜\s]{1,60}｜>|</?[A-Za-z_]{1,30}>|\[/?[A-Z_]{2,30}\]")
"""What special tokens look like: of those that stand in a template, none may be written by whoever is scored."""


class ChatTemplate:
    """A Jinja chat template, as tokenizers carry them, in a sandbox.

    Raises `ValueError` for one that is no Jinja, or names a special token that only a tokenizer knows.
    """

    def __init__(self, source: str) -> None:
        from jinja2 import TemplateSyntaxError
        from jinja2.meta import find_undeclared_variables
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        # As transformers sets it up: templates are written for that.
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = _refuse
        try:
            named = find_undeclared_variables(environment.parse(source)) & {"bos_token", "eos_token"}
            self._template = environment.from_string(source)
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not valid Jinja: line {error.lineno}: {error.message}") from error
        if named:
            raise ValueError(
                f"the chat template names {min(named)}, which only the model's tokenizer knows: write the token itself "
                "there, such as <s>, or nothing where the service adds it"
            )
        self._marks = any_of(_MARKS.findall(source))

    def render(self, messages: Messages, *, add_generation_prompt: bool) -> str:
        from jinja2 import TemplateError

        plain = [{**message, "content": broken_up(content_text(message), self._marks)} for message in messages]
        try:
            return self._template.render(messages=plain, add_generation_prompt=add_generation_prompt)
        except (TemplateError, TypeError, KeyError) as error:
            raise InputError(f"the chat template refuses these messages: {error}") from error


def _refuse(message: str) -> None:
    raise InputError(message)


def _member(value: Any, name: str) -> Any:
    if not isinstance(value, dict) or name not in value:
        raise ScoringError(f"the scoring service's answer has no member {name!r}")
    return value[name]


def _rows(value: Any, count: int | None) -> list[Any]:
    if not isinstance(value, list) or (count is not None and len(value) != count):
        found = f"{len(value)} scores" if isinstance(value, list) else "no list of scores"
        raise ScoringError(f"the scoring service answered with {found} for {count} completions")
    return value


def _last(value: Any) -> Any:
    """Of a list, or of the lists in it: some versions nest a vector of one once more."""
    while isinstance(value, list):
        if not value:
            raise ScoringError("the scoring service answered with an empty list in place of a score")
        value = value[-1]
    return value


def _numbers(value: Any) -> dict[str, float] | None:
    """Of an object of scores; None where there is none."""
    if value is None:
        return None
    if not isinstance(value, dict):
        raise ScoringError(f"the scoring service answered with {value!r} in place of an object of scores")
    return {name: _number(one) for name, one in value.items()}


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ScoringError(f"the scoring service answered with {value!r} in place of a score")
    return float(value)
