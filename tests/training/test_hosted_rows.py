"""What a provider's file holds: its lines, and the members of records that cannot become one."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.records import RecordError
from training.hosted.options import HostedOptions
from training.hosted.rows import Row, converter
from training.hosted.services import SERVICES


def rows(record: dict[str, Any], provider: str = "openai", **settings: Any) -> list[Row]:
    method = settings.pop("method", "dpo" if {"chosen", "ranks"} & set(record) else "sft")
    options = HostedOptions.model_validate(
        {"provider": provider, "method": method, "model": "m", "train": ["t"], "output": "o", **settings}
    )
    return list(converter(options, SERVICES[options.provider].rules)(record).rows)


def lines(record: dict[str, Any], provider: str = "openai", **settings: Any) -> list[Any]:
    return [json.loads(row.line) for row in rows(record, provider, **settings)]


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content} | more


def test_a_demonstration_is_a_conversation() -> None:
    expected = {"messages": [said("user", "2+2?"), said("assistant", "4")]}
    assert lines({"prompt": "2+2?", "completion": "4", "id": "x", "source": "s"}) == [expected]
    assert lines(expected) == [expected]
    answered = said("assistant", "4", refusal=None, annotations=[])
    assert lines({"messages": [said("user", "2+2?"), answered]}) == [expected], "members that not all know stay behind"
    parts = [{"type": "text", "text": "2+2?"}]
    assert lines({"prompt": [{"role": "user", "content": parts}], "completion": "4"}) == [expected]


def test_only_the_completion_is_learnt_unless_asked() -> None:
    turns = [said("developer", "Be brief."), said("user", "Hi"), said("assistant", "Hello"), said("user", "2+2?")]
    record = {"prompt": turns, "completion": "4"}
    (line,) = lines(record)
    assert line["messages"][0] == said("system", "Be brief.")
    assert [message.get("weight") for message in line["messages"]] == [None, None, 0, None, None]
    (line,) = lines(record, every_turn=True)
    assert [message.get("weight") for message in line["messages"]] == [None] * 5
    turns[2]["weight"] = 1
    (line,) = lines(record)
    assert line["messages"][2]["weight"] == 1, "what the record says itself"


def test_a_preference_has_the_three_members_of_the_guide() -> None:
    record = {"prompt": "2+2?", "chosen": "4", "rejected": "5", "margin": 2.0, "weight": 0.5}
    expected = {
        "input": {"messages": [said("user", "2+2?")]},
        "preferred_output": [said("assistant", "4")],
        "non_preferred_output": [said("assistant", "5")],
    }
    for provider in ("openai", "azure", "together", "fireworks"):
        assert lines(record, provider) == [expected]
    (row,) = rows(record)
    (other,) = rows({"prompt": "2+2?", "chosen": "5", "rejected": "4"})
    assert (row.opposite, other.opposite) == (other.key, row.key)
    assert [[message["content"] for message in one] for one in row.conversations] == [["2+2?", "4"], ["2+2?", "5"]]


def test_tools_go_along() -> None:
    tool = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}
    call = {"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}
    asked = [said("user", "2+2?")]
    called = {"role": "assistant", "content": None, "tool_calls": [call]}
    (line,) = lines({"prompt": asked, "completion": [called], "tools": [tool]})
    assert line == {"messages": [*asked, called], "tools": [tool]}
    answered = [*asked, called, said("tool", "4", tool_call_id="c")]
    (line,) = lines({"prompt": answered, "chosen": "4", "rejected": "5", "tools": [tool]}, "together")
    assert line["input"] == {"messages": answered, "tools": [tool]}


RANKS = st.lists(st.integers(1, 4), min_size=2, max_size=6)


@given(RANKS)
def test_a_ranking_becomes_its_untied_pairs(ranks: list[int]) -> None:
    record = {"prompt": "p", "completions": [f"{place}" for place in range(len(ranks))], "ranks": ranks}
    found = [
        (int(line["preferred_output"][0]["content"]), int(line["non_preferred_output"][0]["content"]))
        for line in lines(record)
    ]
    everywhere = range(len(ranks))
    assert sorted(found) == [(i, j) for i in everywhere for j in everywhere if ranks[i] < ranks[j]]
    extreme = lines(record, pairs="best_worst")
    assert len(extreme) == (min(ranks) < max(ranks))
    for line in extreme:
        assert ranks[int(line["preferred_output"][0]["content"])] == min(ranks)
        assert ranks[int(line["non_preferred_output"][0]["content"])] == max(ranks)


def test_ties_and_repetitions_in_a_ranking_are_left_out() -> None:
    options = HostedOptions(provider="openai", method="dpo", model="m", train=["t"], output="o")
    convert = converter(options, SERVICES["openai"].rules)
    converted = convert({"prompt": "p", "completions": ["a", "b", "b", "a"], "ranks": [1, 2, 2, 3]})
    assert len(converted.rows) == 2, "a over b, b over a; a over a says nothing"
    assert converted.num_tied == 2


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
TURNS = [said("user", "u"), said("assistant", "a"), said("user", "v")]


@pytest.mark.parametrize(
    ("provider", "record", "field"),
    [
        ("openai", PAIR | {"method": "sft"}, "record"),
        ("openai", {"prompt": "p", "completion": "c", "method": "dpo"}, "record"),
        ("openai", {"prompt": "p"}, "completion"),
        ("openai", {"prompt": " ", "completion": "c"}, "prompt[0].content"),
        ("openai", {"prompt": "p", "completion": "\n"}, "completion[0].content"),
        ("openai", {"prompt": "p", "completion": "\ud800"}, "completion[0].content"),
        ("openai", {"prompt": [said("system", "s")], "completion": "c"}, "prompt"),
        ("openai", {"prompt": [said("user", "u"), said("system", "s")], "completion": "c"}, "prompt[1].role"),
        ("openai", {"prompt": "p", "completion": [said("user", "u")]}, "completion"),
        ("openai", {"prompt": "p", "completion": [said("assistant", "a", weight=2)]}, "completion[0].weight"),
        ("openai", {"prompt": "p", "completion": [said("assistant", "a", weight=0)]}, "completion"),
        ("openai", {"prompt": [said("user", "u", weight=1)], "completion": "c"}, "prompt[0].weight"),
        ("openai", {"prompt": [said("function", "f")], "completion": "c"}, "prompt[0].role"),
        ("openai", {"prompt": [said("user", "u"), said("tool", "t")], "completion": "c"}, "prompt[1].tool_call_id"),
        (
            "openai",
            {"prompt": "p", "completion": [{"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}]},
            "tools",
        ),
        ("openai", {"prompt": "p", "completion": "c", "tools": "t"}, "tools"),
        (
            "openai",
            {"prompt": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "completion": "c"},
            "prompt[0].content[0]",
        ),
        ("openai", PAIR | {"prompt": TURNS[:2]}, "prompt[1].role"),
        ("openai", PAIR | {"chosen": [said("assistant", "a"), said("user", "u"), said("assistant", "c")]}, "chosen"),
        ("azure", PAIR | {"rejected": [said("user", "u"), said("assistant", "c")]}, "rejected[0].role"),
        ("openai", PAIR | {"chosen": [said("assistant", "b", name="x")], "rejected": "b "}, None),
        ("openai", PAIR | {"chosen": [said("assistant", "b", refusal=None)], "rejected": "b"}, "rejected"),
        ("openai", {"prompt": "p", "completions": ["a", " "], "ranks": [1, 2]}, "completions[1].content"),
        ("together", {"prompt": [TURNS[0], TURNS[0]], "completion": "c"}, "prompt[1].role"),
        ("together", {"prompt": TURNS[1:], "completion": "c"}, "prompt[0].role"),
        ("together", {"prompt": TURNS, "completion": "c"}, None),
        ("openai", {"prompt": TURNS[1:], "completion": "c"}, None),
        ("nebius", {"prompt": TURNS, "completion": "c"}, "prompt"),
        ("nebius", {"prompt": TURNS, "completion": "c", "every_turn": True}, None),
    ],
)
def test_what_breaks_a_providers_rule_is_named(provider: str, record: dict[str, Any], field: str | None) -> None:
    settings = {name: record[name] for name in ("method", "every_turn") if name in record}
    record = {name: value for name, value in record.items() if name not in settings}
    if field is None:
        assert rows(record, provider, **settings)
        return
    with pytest.raises(RecordError) as refused:
        rows(record, provider, **settings)
    assert refused.value.field == field, str(refused.value)


def test_weights_do_not_hide_that_a_prompt_is_the_same() -> None:
    plain = rows({"prompt": TURNS, "completion": "c"})[0]
    whole = rows({"prompt": TURNS, "completion": "c"}, every_turn=True)[0]
    assert plain.prompt_key == whole.prompt_key
    assert plain.key != whole.key


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [said("user", "hi", name="\ud800"), said("assistant", "x")]},
        {
            "messages": [
                said("user", "hi"),
                said("assistant", "", tool_calls=[{"id": "1", "function": {"name": "f", "arguments": "\ud800"}}]),
            ],
            "tools": [{"type": "function", "function": {"name": "f"}}],
        },
        {"prompt": [said("user", "hi", name="\ud800")], "chosen": "a", "rejected": "b"},
    ],
)
def test_half_a_character_outside_of_a_text_is_refused_too(record: dict[str, Any]) -> None:
    with pytest.raises(RecordError, match="half a character"):
        rows(record)
