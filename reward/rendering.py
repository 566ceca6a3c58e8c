"""(prompt, completion) -> token ids, with a mark where the completion starts.

The one place where text becomes ids: training, serving, evaluation and PPO all call it, so a score can
never depend on who asked. Three templates:

* `chat`: the tokenizer's own chat template, rendered once and tokenised once (no second BOS);
* `plain`: `User: …` / `Assistant: …` paragraphs, for tokenizers without a chat template;
* `pair`: `tokenizer(prompt, completion)`, for encoders trained on sentence pairs.

Special tokens that somebody wrote into a message stay text: a space behind their first character keeps the tokenizer
from reading them as its own, so that no message can end its turn and begin another.

Too long for the model: the prompt is cut from its beginning, the completion is kept whole; a completion
that is too long by itself loses its middle. Either is reported as `truncated`.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, cast

from feedback.records import Message, Messages
from reward.errors import InputError

Template = Literal["chat", "plain", "pair"]

_PLAIN_NAMES = {"system": "System", "user": "User", "assistant": "Assistant", "tool": "Tool", "function": "Tool"}


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class SharedPrefix:
    """Tokens that all sequences of one request begin with; one object for all of them."""

    length: int


@dataclass(frozen=True, slots=True)
class Rendered:
    """One sequence, ready for the model."""

    ids: list[int]
    completion_start: int
    """`ids[completion_start:]` is the completion with whatever the template puts around its end. Never empty."""
    token_type_ids: list[int] | None
    """Segment ids where the model wants them (`pair`), else None."""
    truncated: bool
    prompt_tokens: int
    """Before any cut."""
    completion_tokens: int
    """Before any cut."""
    prefix: SharedPrefix | None = None
    """What it may be encoded together with, see `reward/shared_prefix.py`; at least one token lies behind it."""

    def __len__(self) -> int:
        return len(self.ids)


class Renderer:
    """Renders for one tokenizer. Holds no state between calls; safe to use from several threads."""

    def __init__(self, tokenizer: Any, template: Template, max_length: int) -> None:
        """`tokenizer`: a fast `transformers` tokenizer. Raises `InputError` when the template cannot work with it."""
        if template == "chat" and not tokenizer.chat_template:
            raise InputError("the tokenizer has no chat template; use the plain template")
        if not tokenizer.is_fast:
            raise InputError(f"{type(tokenizer).__name__} has no fast (Rust) version, which gives token offsets")
        # The first call lifts the truncation and padding that some tokenizers are stored with: that changes the
        # tokenizer, and must not happen while another thread is using it.
        tokenizer("")
        self._tokenizer = tokenizer
        self._written_specials = _special_tokens(tokenizer)
        self._native_tool_calls = template == "chat" and "tool_calls" in str(tokenizer.chat_template)
        self.template: Template = template
        self.max_length = max_length

    @property
    def vocabulary(self) -> Mapping[str, int]:
        """The tokenizer's tokens and their ids."""
        return cast(Mapping[str, int], self._tokenizer.get_vocab())

    def render(self, prompt: Messages, completion: Messages) -> Rendered:
        """Raises `InputError` when the template refuses these messages or a text is not valid Unicode."""
        prompt_messages = self.normalised(prompt)
        completion_messages = self.normalised(completion)
        if self.template == "pair":
            return self._render_pair(prompt_messages, completion_messages)
        if self.template == "chat":
            text, boundary = self._chat_text(prompt_messages, completion_messages)
            encoded = self._encode(text, add_special_tokens=False, return_offsets_mapping=True)
            ids: list[int] = list(encoded["input_ids"])
        else:
            text, boundary = _plain_text(prompt_messages, completion_messages)
            encoded = self._encode(text, add_special_tokens=True, return_offsets_mapping=True)
            ids = list(encoded["input_ids"])
            end = self._tokenizer.eos_token_id
            if end is not None and ids[-1:] != [end]:
                ids.append(end)
        return self._fit(ids, _start_of_completion(encoded["offset_mapping"], boundary, len(ids)))

    def render_text(self, text: str, prompt: str | None = None) -> Rendered:
        """Text that is templated already, special tokens included, as it stands.

        Only the space is added that the template puts behind a turn's end: whoever writes a turn stops before it, and
        the reward would not be that of the same messages. `prompt` is the beginning of `text` that is no completion;
        without it, the completion is what follows the last heading of an assistant's turn, by the tokenizer's own chat
        template. Raises `InputError` where that is not found, or the text is empty.
        """
        if not text:
            raise InputError("the text is empty")
        if prompt is not None and not text.startswith(prompt):
            raise InputError("the text does not begin with its prompt")
        boundary = len(prompt) if prompt is not None else self._last_turn(text)
        end, space = self._turn_end
        if end and text.endswith(end):
            text += space
        encoded = self._encode(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: list[int] = list(encoded["input_ids"])
        return self._fit(ids, _start_of_completion(encoded["offset_mapping"], boundary, len(ids)))

    def _last_turn(self, text: str) -> int:
        """Where the last assistant's turn begins, behind its heading."""
        heading = self._turn_heading
        position = text.rfind(heading) if heading else -1
        if position < 0:
            raise InputError(
                "where the completion begins cannot be told: send the prompt beside the text, or messages, or text in "
                "this reward model's own chat template"
            )
        return position + len(heading)

    @cached_property
    def _turn_heading(self) -> str:
        return turn_heading(self._tokenizer) if self.template == "chat" else ""

    @cached_property
    def _turn_end(self) -> tuple[str, str]:
        """What the chat template puts behind an assistant's answer: its mark, and space after that."""
        if self.template != "chat":
            return "", ""
        answer = "4711"
        turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": answer}]
        whole: str = self._tokenizer.apply_chat_template(turns, tokenize=False)
        behind = whole.rpartition(answer)[2]
        mark = behind.rstrip()
        return mark, behind[len(mark) :]

    def _fit(self, ids: list[int], start: int) -> Rendered:
        prompt, completion = ids[:start], ids[start:]
        fitted = Rendered(
            ids, start, None, truncated=False, prompt_tokens=len(prompt), completion_tokens=len(completion)
        )
        if len(ids) <= self.max_length:
            return fitted
        completion = _without_middle(completion, self.max_length)
        room = self.max_length - len(completion)
        bos = self._tokenizer.bos_token_id
        if room == 0:
            kept: list[int] = []
        elif bos is not None and prompt[:1] == [bos] and room > 1:
            kept = [bos, *prompt[len(prompt) - room + 1 :]]
        else:
            kept = prompt[len(prompt) - room :]
        return replace(fitted, ids=kept + completion, completion_start=len(kept), truncated=True)

    def _render_pair(self, prompt: list[dict[str, Any]], completion: list[dict[str, Any]]) -> Rendered:
        encoded = self._encode(_pair_text(prompt), _pair_text(completion), return_token_type_ids=True)
        owners = encoded.sequence_ids(0)  # 0 for the prompt's tokens, 1 for the completion's, None for separators
        first = [position for position, owner in enumerate(owners) if owner == 0]
        second = [position for position, owner in enumerate(owners) if owner == 1]
        room = self.max_length - (len(owners) - len(first) - len(second))
        kept_second = _without_middle(second, room)
        kept_first = first[max(len(first) - room + len(kept_second), 0) :]
        # Cutting by position leaves the tokenizer's own layout of separators, whichever it is.
        dropped = {*first, *second}.difference(kept_first, kept_second)
        kept = [position for position in range(len(owners)) if position not in dropped]
        wants_types = "token_type_ids" in self._tokenizer.model_input_names
        return Rendered(
            [encoded["input_ids"][position] for position in kept],
            bisect_left(kept, second[0]) if second else len(kept) - 1,
            [encoded["token_type_ids"][position] for position in kept] if wants_types else None,
            truncated=bool(dropped),
            prompt_tokens=len(first),
            completion_tokens=len(second),
        )

    def _encode(self, *texts: str, **options: Any) -> Any:
        try:
            return self._tokenizer(*texts, **options)
        except TypeError as error:
            # JSON can spell half of a surrogate pair ("\ud800"); the tokenizer cannot take it.
            raise InputError("a text holds half of a surrogate pair: it is not valid Unicode") from error

    def _chat_text(self, prompt: list[dict[str, Any]], completion: list[dict[str, Any]]) -> tuple[str, int]:
        from jinja2.exceptions import TemplateError

        try:
            asked = self._tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
            whole = self._tokenizer.apply_chat_template(prompt + completion, tokenize=False)
        except (TemplateError, TypeError, KeyError) as error:
            raise InputError(f"the reward model's chat template refuses these messages: {error}") from error
        # Some templates change earlier turns once an answer follows; the shared beginning is right for all.
        return whole, _shared_length(asked, whole)

    def normalised(self, messages: Sequence[Message]) -> list[dict[str, Any]]:
        """Messages as the template is given them: in words it knows, with special tokens kept text."""
        return [self._normalise_message(message) for message in messages]

    def _normalise_message(self, message: Message) -> dict[str, Any]:
        normalised = self._in_template_words(message)
        return {name: self._harmless(value) for name, value in normalised.items()}

    def _harmless(self, value: Any) -> Any:
        if isinstance(value, str):
            return broken_up(value, self._written_specials)
        if isinstance(value, list):
            return [self._harmless(member) for member in value]
        if isinstance(value, dict):
            return {self._harmless(name): self._harmless(member) for name, member in value.items()}
        return value

    def _in_template_words(self, message: Message) -> dict[str, Any]:
        role = "system" if message["role"] == "developer" else message["role"]
        text = content_text(message)
        calls = message.get("tool_calls") or []
        if self._native_tool_calls and calls:
            return {**message, "role": role, "content": text, "tool_calls": [_with_arguments(call) for call in calls]}
        if self._native_tool_calls and role == "tool":
            return {**message, "content": text}
        if calls:
            written = [json.dumps(call.get("function", call), ensure_ascii=False, sort_keys=True) for call in calls]
            text = "\n".join([text, *written] if text else written)
        return {"role": role, "content": text}


def turn_heading(tokenizer: Any) -> str:
    """What the tokenizer's chat template puts before an assistant's answer; empty where that cannot be told."""
    asked: list[dict[str, Any]] = [{"role": "user", "content": "a"}]
    without = tokenizer.apply_chat_template(asked, tokenize=False)
    with_heading: str = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    return with_heading.removeprefix(without) if with_heading.startswith(without) else ""


def _start_of_completion(offsets: Sequence[tuple[int, int]], boundary: int, length: int) -> int:
    """The first token that reaches past the boundary, or else the last of all `length`."""
    # Added special tokens have the offsets (0, 0); at the end they belong to the completion, so the search runs over
    # running maxima.
    ends: list[int] = []
    for _, end_offset in offsets:
        ends.append(max(end_offset, ends[-1] if ends else 0))
    return min(bisect_right(ends, boundary), length - 1)


def _special_tokens(tokenizer: Any) -> re.Pattern[str]:
    """What the tokenizer would take out of a text as one of its own."""
    named = {str(token) for token in tokenizer.all_special_tokens}
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return any_of(named | added)


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Matches each of these special tokens; of the longer ones first."""
    # One character cannot be broken by a space.
    ordered = sorted((token for token in tokens if len(token) > 1), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, ordered)) or r"(?!)")


def broken_up(text: str, specials: re.Pattern[str]) -> str:
    """The text with a space behind the first character of whatever looks like a special token."""
    # Most texts hold none and come back as they are. A space can complete no special token anew, but may leave a
    # shorter one behind.
    while specials.search(text):
        text = specials.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)
    return text


def content_text(message: Message) -> str:
    """The words of a message: its content, its text parts joined, or its refusal. Other parts have no words."""
    content = message.get("content")
    if content is None:
        return message.get("refusal") or ""
    if isinstance(content, str):
        return content
    return "\n".join(str(part["text"]) for part in content if isinstance(part.get("text"), str))


def _with_arguments(call: Mapping[str, Any]) -> dict[str, Any]:
    """OpenAI sends a call's arguments as JSON text; chat templates want the object, as vLLM gives it to them."""
    function = call.get("function")
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return dict(call)
    try:
        arguments = json.loads(function["arguments"])
    except ValueError:
        return dict(call)
    return {**call, "function": {**function, "arguments": arguments}}


def _plain_text(prompt: list[dict[str, Any]], completion: list[dict[str, Any]]) -> tuple[str, int]:
    def paragraph(message: dict[str, Any]) -> str:
        return f"{_PLAIN_NAMES.get(message['role'], 'User')}: {message['content']}"

    asked = "\n\n".join(map(paragraph, prompt)) + f"\n\n{_PLAIN_NAMES[completion[0]['role']]}:"
    whole = "\n\n".join(map(paragraph, [*prompt, *completion]))
    return whole, len(asked)


def _pair_text(messages: list[dict[str, Any]]) -> str:
    if len(messages) == 1:
        return str(messages[0]["content"])
    return "\n\n".join(f"{_PLAIN_NAMES.get(m['role'], 'User')}: {m['content']}" for m in messages)


def _shared_length(a: str, b: str) -> int:
    """Characters that two strings have in common from their start."""
    if b.startswith(a):
        return len(a)
    return next((i for i, (left, right) in enumerate(zip(a, b, strict=False)) if left != right), min(len(a), len(b)))


def _without_middle(ids: list[int], length: int) -> list[int]:
    if len(ids) <= length:
        return ids
    tail = length // 2
    return ids[: length - tail] + ids[len(ids) - tail :]
