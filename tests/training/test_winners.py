"""Which completions are learnt from: the best, whole, said once, and good enough."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from training.winners import Rules, select_winners


def record(prompt: str, *completions: tuple[str, float], finish: str = "stop", **more: Any) -> dict[str, Any]:
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "completions": [[{"role": "assistant", "content": text}] for text, _ in completions],
        "rewards": [reward for _, reward in completions],
        "percentiles": [50 + 10 * reward for _, reward in completions],
        "finish_reasons": [finish] * len(completions),
        **more,
    }


def words(records: list[dict[str, Any]], rules: Rules) -> list[str]:
    return [str(one.completion[0]["content"]) for one in select_winners(records, rules)[0]]


def test_the_best_of_each_prompt_wins_and_keeps_where_it_is_from() -> None:
    records = [record("p", ("a", 1), ("b", 3), ("c", 2), id="x", source="s"), record("q", ("d", -1), ("e", -1))]
    winners, selection = select_winners(records, Rules())
    assert [one.as_record() for one in winners] == [
        {
            "id": "x",
            "source": "s",
            "prompt": [{"role": "user", "content": "p"}],
            "completion": [{"role": "assistant", "content": "b"}],
            "reward": 3,
        },
        {
            "prompt": [{"role": "user", "content": "q"}],
            "completion": [{"role": "assistant", "content": "d"}],
            "reward": -1,
        },
    ]
    assert (selection.prompts, selection.completions, selection.outdone) == (2, 5, 3)
    assert (selection.mean_reward, selection.winners_mean_reward) == (pytest.approx(0.8), 1)


def test_several_winners_stand_in_the_order_they_were_drawn() -> None:
    assert words([record("p", ("a", 1), ("b", 3), ("c", 2))], Rules(per_prompt=2)) == ["b", "c"]


def test_a_threshold_holds_for_the_best_too() -> None:
    records = [record("p", ("a", 1), ("b", 2)), record("q", ("c", 0.5))]
    assert words(records, Rules(min_reward=1.5)) == ["b"]
    assert words(records, Rules(min_percentile=55)) == ["b", "c"]
    assert select_winners(records, Rules(min_reward=9))[1].too_low == 2


def test_a_percentile_needs_references() -> None:
    bare = record("p", ("a", 1)) | {"percentiles": [None]}
    with pytest.raises(ValueError, match="knows no references"):
        select_winners([bare], Rules(min_percentile=10))
    assert words([bare], Rules(min_reward=0)) == ["a"]


def test_the_best_share_of_all_is_kept() -> None:
    records = [record(name, (name, reward)) for name, reward in (("a", 1), ("b", 4), ("c", 2), ("d", 3))]
    assert words(records, Rules(top_share=0.5)) == ["b", "d"]
    assert words(records, Rules(top_share=0.01)) == ["b"]
    assert len(words([record(f"p{n}", ("a", n)) for n in range(100)], Rules(top_share=0.07))) == 7


def test_what_was_cut_off_or_says_nothing_is_not_learnt() -> None:
    records = [record("p", ("cut", 9), finish="length"), record("p", (" ", 8), ("fine", 1))]
    winners, selection = select_winners(records, Rules())
    assert [one.completion[0]["content"] for one in winners] == ["fine"]
    assert (selection.cut_off, selection.empty) == (1, 1)
    assert words(records, Rules(keep_cut_off=True)) == ["cut"]


def test_a_prompt_in_two_records_is_one_prompt_and_repeats_count_once() -> None:
    records = [record("p", ("a", 1), ("a", 1)), record("p", ("b", 2), ("a", 1))]
    winners, selection = select_winners(records, Rules(per_prompt=5))
    assert [one.completion[0]["content"] for one in winners] == ["a", "b"]
    assert (selection.prompts, selection.repeated) == (1, 2)


@given(
    st.lists(
        st.tuples(st.sampled_from("pqr"), st.lists(st.tuples(st.sampled_from(["", "a", "b", "c"]), st.floats(-3, 3)))),
        max_size=6,
    ),
    st.integers(1, 3),
    st.floats(-3, 3),
    st.floats(0.1, 1),
)
def test_every_completion_is_counted_once(
    drawn: list[tuple[str, list[tuple[str, float]]]], per_prompt: int, min_reward: float, top_share: float
) -> None:
    records = [record(prompt, *completions) for prompt, completions in drawn]
    winners, found = select_winners(records, Rules(per_prompt, min_reward, top_share=top_share))
    reasons = found.cut_off + found.empty + found.repeated + found.outdone + found.too_low + found.not_top
    assert reasons + found.winners == found.completions
    assert len(winners) == found.winners
    assert all(one.reward >= min_reward for one in winners)
    if found.winners_mean_reward is not None and not found.repeated:
        assert found.winners_mean_reward >= min(reward for _, own in drawn for _, reward in own)
