from __future__ import annotations

from itertools import combinations
from math import comb

from hypothesis import given
from hypothesis import strategies as st

from feedback.rankings import ComparisonGroup, group_comparisons, ranking_pairs
from feedback.records import Messages, Preference, Ranking

ranks_lists = st.lists(st.integers(1, 6), min_size=1, max_size=8)


def said(text: str) -> Messages:
    return [{"role": "assistant", "content": text}]


def asked(text: str) -> Messages:
    return [{"role": "user", "content": text}]


def won(group: ComparisonGroup) -> list[tuple[object, object]]:
    """(better, worse) as texts."""
    texts = [completion[0].get("content") for completion in group.completions]
    return [(texts[pair.better], texts[pair.worse]) for pair in group.pairs]


def test_a_worked_ranking() -> None:
    # b is best, a and d tie, c is last: five decided pairs of six.
    assert sorted(ranking_pairs([2, 1, 3, 2])) == [(0, 2), (1, 0), (1, 2), (1, 3), (3, 2)]


@given(ranks_lists)
def test_every_untied_pair_is_decided_once(ranks: list[int]) -> None:
    pairs = ranking_pairs(ranks)
    ties = sum(a == b for a, b in combinations(ranks, 2))
    assert len(pairs) == len(set(pairs)) == comb(len(ranks), 2) - ties
    assert all(ranks[better] < ranks[worse] for better, worse in pairs)
    assert not {(worse, better) for better, worse in pairs} & set(pairs)


@given(ranks_lists, st.randoms())
def test_pairs_follow_their_completions_through_any_reordering(ranks: list[int], random: object) -> None:
    order = list(range(len(ranks)))
    random.shuffle(order)  # type: ignore[attr-defined]  # hypothesis's random.Random
    shuffled = ranking_pairs([ranks[i] for i in order])
    assert {(order[better], order[worse]) for better, worse in shuffled} == set(ranking_pairs(ranks))


@given(ranks_lists, st.integers(1, 100))
def test_only_the_order_of_ranks_counts(ranks: list[int], factor: int) -> None:
    assert ranking_pairs([rank * factor for rank in ranks]) == ranking_pairs(ranks)


def test_comparisons_of_one_prompt_become_one_group() -> None:
    groups = group_comparisons(
        [
            Preference(asked("one"), said("a"), said("b"), margin=0.5, weight=2.0),
            Ranking(asked("two"), [said("x"), said("y")], [2, 1]),
            Ranking(asked("one"), [said("b"), said("c"), said("a")], [1, 2, 2], weight=0.5),
        ]
    )
    assert [group.prompt for group in groups] == [asked("one"), asked("two")]
    first, second = groups
    assert [completion[0].get("content") for completion in first.completions] == ["a", "b", "c"]
    assert won(first) == [("a", "b"), ("b", "c"), ("b", "a")]
    assert [(pair.weight, pair.margin) for pair in first.pairs] == [(2.0, 0.5), (0.5, 0.0), (0.5, 0.0)]
    assert won(second) == [("y", "x")]


def test_a_pair_given_twice_counts_twice() -> None:
    record = Preference(asked("p"), said("a"), said("b"))
    (group,) = group_comparisons([record, record])
    assert len(group.completions) == 2
    assert won(group) == [("a", "b"), ("a", "b")]


def test_prompts_of_different_sources_stay_apart() -> None:
    records = [Preference(asked("p"), said("a"), said("b"), source=source) for source in ("web", None, "web")]
    groups = group_comparisons(records, default_source="file")
    assert [(group.source, len(group.pairs)) for group in groups] == [("web", 2), ("file", 1)]


def test_nothing_is_learnt_from_ties_or_from_a_completion_against_itself() -> None:
    tied = Ranking(asked("tied"), [said("a"), said("b")], [1, 1])
    contradictory = Ranking(asked("twice"), [said("a"), said("a")], [1, 2])
    assert group_comparisons([tied, contradictory]) == []
    partly = Ranking(asked("partly"), [said("a"), said("a"), said("b")], [1, 2, 3])
    (group,) = group_comparisons([partly])
    assert won(group) == [("a", "b"), ("a", "b")]


def test_completions_differ_by_anything_in_their_messages() -> None:
    def call(arguments: str) -> Messages:
        return [{"role": "assistant", "content": None, "tool_calls": [{"function": {"arguments": arguments}}]}]

    (group,) = group_comparisons([Preference(asked("p"), call("{}"), call('{"a": 1}'))])
    assert len(group.completions) == 2
