"""Records of human data become rows of a provider's file, or a `RecordError` that names the member and the rule.

The rows are OpenAI's: `{"messages"}` for SFT (https://platform.openai.com/docs/guides/supervised-fine-tuning) and
`{"input", "preferred_output", "non_preferred_output"}` for DPO
(https://platform.openai.com/docs/guides/direct-preference-optimization), which the others take too. Only members that
all of them know are written.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from feedback.rankings import ranking_pairs
from feedback.records import (
    Message,
    Messages,
    RecordError,
    parse_demonstration,
    parse_preference,
    parse_ranking,
)
from reward.rendering import content_text
from training.hosted.options import HostedOptions
from training.hosted.providers import Rules

Wire = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the file."""

    line: str
    key: str
    """Equal for rows that say the same."""
    opposite: str | None
    """Of a pair: the key of the pair the other way round."""
    prompt_key: str
    conversations: tuple[tuple[Wire, ...], ...]
    """What is trained on, as conversations: one for SFT, two for a pair, each with its prompt. For counting."""
    tools: Sequence[Wire] | None
    """What stands before each of them."""


@dataclass(frozen=True, slots=True)
class Converted:
    """What became of a record."""

    rows: Sequence[Row]
    num_tied: int = 0
    """Pairs of a ranking that are tied, or whose completions are the same: there is nothing to learn."""


def converter(options: HostedOptions, rules: Rules) -> Callable[[Mapping[str, Any]], Converted]:
    """For `located_records`: a decoded record to rows. What it returns raises `RecordError`."""
    if options.method == "dpo":
        return lambda record: _preferences(record, options, rules)
    return lambda record: _demonstration(record, options, rules)


def _demonstration(record: Mapping[str, Any], options: HostedOptions, rules: Rules) -> Converted:
    """Without `every_turn` the prompt's own assistant messages weigh nothing, unless they say otherwise."""
    if "chosen" in record or "ranks" in record:
        raise RecordError("record", "is a preference or ranking: set method: dpo, or give demonstrations")
    parsed = parse_demonstration(record)
    prompt_name = "messages" if record.get("prompt") is None else "prompt"
    tools = _tools(record, rules)
    prompt = _written(parsed.prompt, prompt_name, rules, with_weights=True)
    end_name = f"messages[{len(parsed.prompt)}]" if prompt_name == "messages" else "completion"
    completion = _written(parsed.completion, end_name, rules, with_weights=True)
    _check_conversation(prompt, prompt_name, rules)
    _check_completion(completion, end_name)
    _check_turns([*prompt, *completion], prompt_name, rules)
    _check_calls([*prompt, *completion], prompt_name, tools)
    if not options.every_turn and any(message["role"] == "assistant" for message in prompt):
        if not rules.weights:
            raise RecordError(
                prompt_name,
                f"holds assistant messages, which {options.provider} cannot leave unlearnt: set every_turn: true",
            )
        prompt = [{"weight": 0} | message if message["role"] == "assistant" else message for message in prompt]
    if all(message.get("weight") == 0 for message in [*prompt, *completion] if message["role"] == "assistant"):
        raise RecordError(end_name, "weighs 0 like all other assistant messages: there is nothing to learn")
    wire: Wire = {"messages": [*prompt, *completion]} | ({"tools": tools} if tools else {})
    return Converted([_row(wire, prompt, [[*prompt, *completion]])])


def _preferences(record: Mapping[str, Any], options: HostedOptions, rules: Rules) -> Converted:
    if "ranks" not in record:
        if "chosen" not in record and ("completion" in record or "messages" in record):
            raise RecordError("record", "is a demonstration: set method: sft, or give preferences and rankings")
        parsed = parse_preference(record)
        return Converted(
            [_pair(record, parsed.prompt, (parsed.chosen, "chosen"), (parsed.rejected, "rejected"), rules)]
        )
    ranking = parse_ranking(record)
    ranks = ranking.ranks
    pairs = ranking_pairs(ranks)
    num_all = len(ranks) * (len(ranks) - 1) // 2
    decided = [
        (better, worse)
        for better, worse in pairs
        if list(ranking.completions[better]) != list(ranking.completions[worse])
    ]
    num_tied = num_all - len(decided)
    if options.pairs == "best_worst":
        decided = [pair for pair in decided if (ranks[pair[0]], ranks[pair[1]]) == (min(ranks), max(ranks))][:1]
    rows = [
        _pair(
            record,
            ranking.prompt,
            (ranking.completions[better], f"completions[{better}]"),
            (ranking.completions[worse], f"completions[{worse}]"),
            rules,
        )
        for better, worse in decided
    ]
    # A completion that stands twice in a ranking gives the same pair twice.
    return Converted(list({row.key: row for row in rows}.values()), num_tied)


def _pair(
    record: Mapping[str, Any],
    prompt: Messages,
    chosen: tuple[Messages, str],
    rejected: tuple[Messages, str],
    rules: Rules,
) -> Row:
    """Margins and weights stay behind: no service takes them."""
    tools = _tools(record, rules)
    asked = _written(prompt, "prompt", rules)
    _check_conversation(asked, "prompt", rules)
    if asked[-1]["role"] not in ("user", "tool"):
        raise RecordError(f"prompt[{len(asked) - 1}].role", "the last message of a prompt must be the user's")
    outputs = []
    for messages, name in (chosen, rejected):
        output = _written(messages, name, rules)
        if len(output) > 1 and not rules.several_outputs:
            raise RecordError(name, f"has {len(output)} messages; the provider takes exactly one, of the assistant")
        _check_completion(output, name)
        for place, message in enumerate(output):
            if message["role"] not in ("assistant", "tool"):
                raise RecordError(f"{name}[{place}].role", f"{message['role']!r} cannot stand in an output")
        _check_turns([*asked, *output], "prompt", rules)
        _check_calls([*asked, *output], "prompt", tools)
        outputs.append(output)
    if outputs[0] == outputs[1]:
        raise RecordError(rejected[1], f"says the same as {chosen[1]}")
    given: Wire = {"messages": asked} | ({"tools": tools} if tools else {})
    wire: Wire = {"input": given, "preferred_output": outputs[0], "non_preferred_output": outputs[1]}
    opposite = {**wire, "preferred_output": outputs[1], "non_preferred_output": outputs[0]}
    return _row(wire, asked, [[*asked, *output] for output in outputs], opposite)


def _row(
    wire: Wire, prompt: Sequence[Wire], conversations: Sequence[Sequence[Wire]], opposite: Wire | None = None
) -> Row:
    line = json.dumps(wire, ensure_ascii=False)
    try:
        line.encode()
    except UnicodeEncodeError as error:
        raise RecordError("record", "holds half a character in a name or a call, which UTF-8 cannot") from error
    return Row(
        line=line,
        key=_digest(wire),
        opposite=None if opposite is None else _digest(opposite),
        prompt_key=_digest([{**message, "weight": None} for message in prompt]),
        conversations=tuple(tuple(one) for one in conversations),
        tools=wire.get("input", wire).get("tools"),
    )


def _digest(value: object) -> str:
    text = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


# --- messages ---------------------------------------------------------------------------------------------------


def _written(messages: Messages, name: str, rules: Rules, *, with_weights: bool = False) -> list[Wire]:
    """The messages with the members that every service knows."""
    single = len(messages) == 1 and "[" in name
    return [
        _message(message, name if single else f"{name}[{place}]", rules, with_weights=with_weights)
        for place, message in enumerate(messages)
    ]


def _message(message: Message, name: str, rules: Rules, *, with_weights: bool) -> Wire:
    # Reasoning models' name for the same thing; tuned models know the other.
    role = "system" if message["role"] == "developer" else message["role"]
    if role == "function":
        raise RecordError(f"{name}.role", "'function' is OpenAI's old way to call tools: write role tool")
    written: Wire = {"role": role}
    calls = message.get("tool_calls")
    if (calls or role == "tool") and not rules.tools:
        raise RecordError(f"{name}.tool_calls", "the provider takes no tools")
    written |= _content(message, name, required=not calls)
    if calls:
        written["tool_calls"] = calls
    if role == "tool":
        if not message.get("tool_call_id"):
            raise RecordError(f"{name}.tool_call_id", "is missing")
        written["tool_call_id"] = message["tool_call_id"]
    if message.get("name"):
        written["name"] = message["name"]
    weight = message.get("weight")
    if weight is not None and with_weights:
        if weight not in (0, 1) or isinstance(weight, bool):
            raise RecordError(f"{name}.weight", "must be 0 or 1")
        if role != "assistant" or not rules.weights:
            raise RecordError(f"{name}.weight", "only assistant messages of some providers have one")
        written["weight"] = 1 if weight else 0
    return written


def _content(message: Message, name: str, *, required: bool) -> Wire:
    content = message.get("content")
    if isinstance(content, list):
        for place, part in enumerate(content):
            if not isinstance(part.get("text"), str):
                raise RecordError(f"{name}.content[{place}]", "is no text, and only text is taken")
    text = content_text(message)
    if not text.strip():
        if required:
            raise RecordError(f"{name}.content", "is empty")
        return {"content": None}
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RecordError(f"{name}.content", f"holds half a character at {error.start}, which UTF-8 cannot") from error
    return {"content": text}


def _tools(record: Mapping[str, Any], rules: Rules) -> list[Any] | None:
    tools = record.get("tools")
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RecordError("tools", "must be a list of objects")
    if not rules.tools:
        raise RecordError("tools", "the provider takes no tools")
    return tools


def _check_conversation(messages: Sequence[Wire], name: str, rules: Rules) -> None:
    for place, message in enumerate(messages):
        if message["role"] == "system" and place > 0:
            raise RecordError(f"{name}[{place}].role", "a system message can only come first")
    if all(message["role"] == "system" for message in messages):
        raise RecordError(name, "has no user message")


def _check_completion(messages: Sequence[Wire], name: str) -> None:
    if messages[-1]["role"] != "assistant":
        raise RecordError(name, "must end with an assistant message")


def _check_turns(messages: Sequence[Wire], name: str, rules: Rules) -> None:
    """User and assistant in turns, where a provider insists; a tool's answers belong to the assistant's turn."""
    if not rules.alternating:
        return
    expected = "user"
    for place, message in enumerate(messages):
        role = message["role"]
        if role == "system" or (role == "tool" and place > 0):
            continue
        follows_tool = role == "assistant" and place > 0 and messages[place - 1]["role"] == "tool"
        if role != expected and not follows_tool:
            raise RecordError(
                f"{name}[{place}].role",
                f"is {role!r}; with this provider user and assistant take turns, the user first",
            )
        expected = "assistant" if role == "user" else "user"


def _check_calls(messages: Sequence[Wire], name: str, tools: Sequence[Any] | None) -> None:
    for place, message in enumerate(messages):
        if message.get("tool_calls") and not tools:
            raise RecordError("tools", f"is missing, and {name}[{place}] calls some")
