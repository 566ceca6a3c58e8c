from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feedback.records import (
    ROLES,
    RecordError,
    parse_completions,
    parse_demonstration,
    parse_messages,
    parse_preference,
    parse_prompt,
    parse_ranking,
)

USER = {"role": "user", "content": "Why?"}
GOOD = {"role": "assistant", "content": "Because."}
BAD = {"role": "assistant", "content": "No."}

Parse = Callable[[Mapping[str, Any]], object]

texts = st.text(min_size=1, max_size=20)
messages = st.fixed_dictionaries(
    {"role": st.sampled_from(sorted(ROLES)), "content": st.one_of(texts, st.none())},
    optional={
        "name": texts,
        "tool_calls": st.lists(st.fixed_dictionaries({"id": texts, "function": st.dictionaries(texts, texts)})),
    },
)
conversations = st.lists(messages, min_size=1, max_size=4)
identities = st.fixed_dictionaries({}, optional={"id": texts, "source": texts})


def test_a_string_is_one_message_of_the_role_its_place_asks_for() -> None:
    prompt = [{"role": "user", "content": "Why?"}]
    assert parse_prompt({"prompt": "Why?"}).prompt == prompt
    demonstration = parse_demonstration({"prompt": "Why?", "completion": "Because."})
    assert demonstration.prompt == prompt
    assert demonstration.completion == [GOOD]
    preference = parse_preference({"prompt": "Why?", "chosen": "Because.", "rejected": "No."})
    assert (preference.chosen, preference.rejected) == ([GOOD], [BAD])
    ranking = parse_ranking({"prompt": "Why?", "completions": ["Because.", [BAD]], "ranks": [1, 2]})
    assert ranking.completions == [[GOOD], [BAD]]


def test_one_message_stands_for_a_list_of_one() -> None:
    assert parse_prompt({"prompt": USER}).prompt == [USER]


def test_members_that_winnow_does_not_know_stay_with_their_message() -> None:
    message = {"role": "assistant", "content": None, "audio": {"id": "a"}, "tool_calls": [{"id": "c"}]}
    assert parse_messages([message], "prompt", "user") == [message]


def test_identity_becomes_text_and_absence_stays_absence() -> None:
    parsed = parse_prompt({"prompt": "Why?", "id": 7, "source": None})
    assert (parsed.id, parsed.source) == ("7", None)


def test_a_demonstration_may_be_one_conversation() -> None:
    system = {"role": "system", "content": "Be short."}
    parsed = parse_demonstration({"messages": [system, USER, GOOD]})
    assert (parsed.prompt, parsed.completion) == ([system, USER], [GOOD])


def test_a_null_field_is_an_absent_field() -> None:
    """Tables give every record every column."""
    parsed = parse_demonstration({"prompt": None, "completion": None, "messages": [USER, GOOD]})
    assert parsed.completion == [GOOD]
    empty = {"margin": None, "weight": None, "id": None}
    preference = parse_preference({"prompt": None, "chosen": [USER, GOOD], "rejected": [USER, BAD], **empty})
    assert preference.prompt == [USER]
    assert (preference.margin, preference.weight) == (None, 1.0)
    assert parse_completions({"prompt": "Why?", "completion": "Because.", "completions": None}).completions == [[GOOD]]


def test_the_implicit_prompt_is_the_shared_beginning() -> None:
    more = {"role": "assistant", "content": "More."}
    parsed = parse_preference({"chosen": [USER, GOOD, USER, more], "rejected": [USER, GOOD, USER, BAD]})
    assert parsed.prompt == [USER, GOOD, USER]
    assert (parsed.chosen, parsed.rejected) == ([more], [BAD])


def test_a_prompt_repeated_in_whole_conversations_is_no_part_of_the_completions() -> None:
    parsed = parse_preference({"prompt": "Why?", "chosen": [USER, GOOD], "rejected": [USER, BAD]})
    assert (parsed.prompt, parsed.chosen, parsed.rejected) == ([USER], [GOOD], [BAD])


def test_completions_take_one_or_several() -> None:
    assert parse_completions({"prompt": "Why?", "completion": "Because."}).completions == [[GOOD]]
    assert parse_completions({"prompt": "Why?", "completions": ["Because.", "No."]}).completions == [[GOOD], [BAD]]


PREFERENCE: dict[str, Any] = {"prompt": "p", "chosen": "a", "rejected": "b"}
RANKING: dict[str, Any] = {"prompt": "p", "completions": ["a", "b"], "ranks": [1, 2]}


@pytest.mark.parametrize(
    ("parse", "record", "field"),
    [
        (parse_prompt, {}, "prompt"),
        (parse_prompt, {"prompt": ""}, "prompt"),
        (parse_prompt, {"prompt": []}, "prompt"),
        (parse_prompt, {"prompt": 3}, "prompt"),
        (parse_prompt, {"prompt": ["Why?"]}, "prompt[0]"),
        (parse_prompt, {"prompt": [USER, {"content": "x"}]}, "prompt[1].role"),
        (parse_prompt, {"prompt": [{"role": "robot", "content": "x"}]}, "prompt[0].role"),
        (parse_prompt, {"prompt": [{"role": ["user"], "content": "x"}]}, "prompt[0].role"),
        (parse_prompt, {"prompt": [{"role": "user", "content": 3}]}, "prompt[0].content"),
        (parse_prompt, {"prompt": [{"role": "user", "content": ["x"]}]}, "prompt[0].content[0]"),
        (parse_prompt, {"prompt": [{"role": "assistant", "tool_calls": "x"}]}, "prompt[0].tool_calls"),
        (parse_prompt, {"prompt": [{"role": "assistant", "tool_calls": ["x"]}]}, "prompt[0].tool_calls[0]"),
        (parse_demonstration, {"prompt": "p"}, "completion"),
        (parse_demonstration, {"messages": [USER]}, "messages"),
        (parse_demonstration, {"messages": [GOOD]}, "messages"),
        (parse_demonstration, {}, "prompt"),
        (parse_preference, PREFERENCE | {"chosen": None}, "chosen"),
        (parse_preference, {"prompt": "p", "chosen": "a"}, "rejected"),
        (parse_preference, {"chosen": "a", "rejected": "b"}, "prompt"),
        (parse_preference, PREFERENCE | {"rejected": "a"}, "rejected"),
        (parse_preference, {"chosen": [USER, GOOD], "rejected": [USER]}, "chosen"),
        (parse_preference, {"prompt": "Why?", "chosen": [USER], "rejected": [USER, BAD]}, "chosen"),
        (parse_preference, PREFERENCE | {"margin": "much"}, "margin"),
        (parse_preference, PREFERENCE | {"margin": True}, "margin"),
        (parse_preference, PREFERENCE | {"margin": float("inf")}, "margin"),
        (parse_preference, PREFERENCE | {"weight": float("nan")}, "weight"),
        (parse_preference, PREFERENCE | {"weight": -1}, "weight"),
        (parse_ranking, RANKING | {"completions": "a"}, "completions"),
        (parse_ranking, RANKING | {"completions": ["a", 3]}, "completions[1]"),
        (parse_ranking, RANKING | {"completions": ["a", [{"role": "x"}]]}, "completions[1][0].role"),
        (parse_ranking, RANKING | {"completions": ["a"], "ranks": [1]}, "completions"),
        (parse_ranking, RANKING | {"ranks": None}, "ranks"),
        (parse_ranking, RANKING | {"ranks": [1, 2, 3]}, "ranks"),
        (parse_ranking, RANKING | {"ranks": [1, 2.0]}, "ranks"),
        (parse_ranking, RANKING | {"ranks": [1, True]}, "ranks"),
        (parse_ranking, RANKING | {"ranks": [0, 1]}, "ranks"),
        (parse_ranking, {"completions": ["a", "b"], "ranks": [1, 2]}, "prompt"),
        (parse_completions, {"prompt": "p"}, "completion"),
        (parse_completions, {"prompt": "p", "completions": []}, "completions"),
    ],
)
def test_a_bad_record_names_its_field(parse: Parse, record: dict[str, Any], field: str) -> None:
    with pytest.raises(RecordError) as caught:
        parse(record)
    assert caught.value.field == field
    assert str(caught.value) == f"{field}: {caught.value.problem}"


@given(conversations, conversations, identities)
def test_demonstrations_survive_json(prompt: list[Any], completion: list[Any], identity: dict[str, str]) -> None:
    record = {"prompt": prompt, "completion": completion, **identity}
    parsed = parse_demonstration(json.loads(json.dumps(record)))
    assert (parsed.prompt, parsed.completion) == (prompt, completion)
    assert (parsed.id, parsed.source) == (identity.get("id"), identity.get("source"))


@given(conversations, messages, messages, identities)
def test_explicit_and_implicit_prompts_say_the_same(
    prompt: list[Any], chosen: dict[str, Any], rejected: dict[str, Any], identity: dict[str, str]
) -> None:
    if chosen == rejected:
        with pytest.raises(RecordError):
            parse_preference({"prompt": prompt, "chosen": [chosen], "rejected": [rejected]})
        return
    explicit = parse_preference({"prompt": prompt, "chosen": [chosen], "rejected": [rejected], **identity})
    implicit = parse_preference({"chosen": [*prompt, chosen], "rejected": [*prompt, rejected], **identity})
    assert explicit == implicit


@given(st.lists(st.tuples(conversations, st.integers(1, 5)), min_size=2, max_size=5), st.floats(0, 10))
def test_rankings_survive_json(ranked: list[tuple[list[Any], int]], weight: float) -> None:
    completions, ranks = [completion for completion, _ in ranked], [rank for _, rank in ranked]
    record = {"prompt": "p", "completions": completions, "ranks": ranks, "weight": weight}
    parsed = parse_ranking(json.loads(json.dumps(record)))
    assert (parsed.completions, parsed.ranks, parsed.weight) == (completions, ranks, weight)


@given(st.recursive(st.none() | st.booleans() | st.floats() | st.text(max_size=3), st.lists, max_leaves=5))
def test_nothing_but_a_record_error_comes_out_of_nonsense(nonsense: object) -> None:
    for parse in (parse_prompt, parse_demonstration, parse_preference, parse_ranking, parse_completions):
        record = dict.fromkeys(("prompt", "completion", "completions", "chosen", "rejected", "ranks"), nonsense)
        try:
            parse(record)
        except RecordError as error:
            assert error.field
