"""Win rates: by hand, mirrored, against scikit-learn, and where only length decides."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.linear_model import LogisticRegression

from feedback.records import Message, Preference, Ranking
from training.evaluation import wilson_interval
from training.winrate import (
    PRIOR_STD,
    Meeting,
    Sides,
    compare_models,
    meetings_by_people,
    meetings_by_reward,
    win_share,
)

NAMES = ("first", "second")


def said(text: str) -> list[Message]:
    return [{"role": "assistant", "content": text}]


def sides(first: list[str], second: list[str]) -> Sides:
    return Sides([{"role": "user", "content": "?"}], [said(one) for one in first], [said(one) for one in second])


def singles(scores: list[float], gaps: list[float] | None = None) -> list[Meeting]:
    gaps = gaps or [0.0] * len(scores)
    return [Meeting(i, score, gap) for i, (score, gap) in enumerate(zip(scores, gaps, strict=True))]


def test_every_completion_meets_every_other() -> None:
    found = meetings_by_reward([sides(["long one", "b"], ["c"]), sides(["d"], ["d"])], [[2.0, 0.5, 1.0], [3.0, 3.0]])
    assert found == [Meeting(0, 1.0, 7, 1.0), Meeting(0, 0.0, 0, -0.5), Meeting(1, 0.5, 0, 0.0)]


def test_a_comparison_by_hand() -> None:
    found = compare_models(NAMES, "judge", singles([1, 1, 1, 1, 1, 1, 0.5, 0]), (10.0, 20.0))
    assert (found.prompts, found.wins, found.ties, found.losses) == (8, 6, 1, 1)
    assert found.win_rate.value == pytest.approx(6.5 / 8)
    # Sign test on 7 decided prompts, 6 : 1: two tails of 1 + 7 ways in 2⁷.
    assert found.p_value == pytest.approx(2 * 8 / 128)
    assert found.reward_gap is None
    assert found.verdict == "no significant difference between first and second"


def test_the_interval_is_wilsons_where_each_prompt_is_one_throw() -> None:
    share = win_share(np.array([1.0] * 30 + [0.0] * 10))
    assert (share.low, share.high) == pytest.approx(wilson_interval(30, 40))
    tied = win_share(np.array([1.0] * 15 + [0.5] * 20 + [0.0] * 5))
    assert tied.high - tied.low < share.high - share.low, "ties vary less"
    assert win_share(np.ones(10)).low == pytest.approx(wilson_interval(10, 10)[0])


def test_prompts_count_alike_however_many_meetings_they_have() -> None:
    meetings = [Meeting(0, 1.0, 0) for _ in range(9)] + [Meeting(1, 0.0, 0)]
    assert compare_models(NAMES, "judge", meetings, (1, 1)).win_rate.value == 0.5


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-300, 300), st.floats(-2, 2)), min_size=2, max_size=40
    )
)
def test_the_other_way_round_everything_is_mirrored(drawn: list[tuple[float, int, float]]) -> None:
    one = [Meeting(i, score, gap, reward) for i, (score, gap, reward) in enumerate(drawn)]
    other = [Meeting(i, 1 - score, -gap, -reward) for i, (score, gap, reward) in enumerate(drawn)]
    a, b = (compare_models(NAMES, "judge", meetings, (1, 1)) for meetings in (one, other))
    assert a.win_rate.value == pytest.approx(1 - b.win_rate.value)
    assert (a.win_rate.low, a.win_rate.high) == pytest.approx((1 - b.win_rate.high, 1 - b.win_rate.low))
    assert (a.wins, a.losses, a.p_value) == (b.losses, b.wins, b.p_value)
    mine, theirs = a.length_controlled, b.length_controlled
    assert mine.win_rate.value == pytest.approx(1 - theirs.win_rate.value, abs=1e-6)
    assert mine.length_effect == pytest.approx(theirs.length_effect, abs=1e-6)
    assert a.reward_gap is not None and b.reward_gap is not None
    assert a.reward_gap.value == pytest.approx(-b.reward_gap.value, abs=1e-9)


def test_the_length_model_is_the_logistic_regression_of_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    gaps = rng.normal(40, 120, 200).round()
    chance = 1 / (1 + np.exp(-(0.4 + 1.1 * np.tanh(gaps / gaps.std()))))
    scores = (rng.random(200) < chance).astype(float)
    found = compare_models(NAMES, "judge", singles(list(scores), list(gaps)), (1, 1)).length_controlled
    features = np.column_stack([np.ones(200), np.tanh(gaps / gaps.std())])
    reference = LogisticRegression(C=PRIOR_STD**2, fit_intercept=False, tol=1e-10).fit(features, scores)
    theta, phi = reference.coef_[0]
    assert found.win_rate.value == pytest.approx(1 / (1 + math.exp(-theta)), abs=1e-4)
    assert found.length_effect == pytest.approx(phi, abs=1e-3)
    assert found.win_rate.low < 1 / (1 + math.exp(-0.4)) < found.win_rate.high
    assert not found.extrapolates


def test_a_judge_of_length_alone_prefers_nobody_at_equal_length() -> None:
    rng = np.random.default_rng(1)
    gaps = rng.normal(100, 100, 400)
    found = compare_models(NAMES, "judge", singles([float(gap > 0) for gap in gaps], list(gaps)), (1, 1))
    assert found.win_rate.value > 0.8
    assert abs(found.length_controlled.win_rate.value - 0.5) < 0.06
    assert found.length_controlled.length_effect > 3


def test_where_one_always_writes_more_it_says_that_it_guesses() -> None:
    found = compare_models(NAMES, "judge", singles([1, 0, 1, 1], [5, 9, 2, 7]), (1, 1))
    assert found.length_controlled.extrapolates


def test_wins_throughout_have_a_finite_strength_and_an_interval() -> None:
    found = compare_models(NAMES, "judge", singles([1.0] * 50), (1, 1))
    assert 0.95 < found.length_controlled.win_rate.value < 1
    assert found.better
    assert found.verdict == "first is better than second"


def test_both_intervals_agree_where_there_are_many_prompts() -> None:
    scores = [1.0] * 130 + [0.5] * 40 + [0.0] * 80
    found = compare_models(NAMES, "judge", singles(scores), (1, 1))
    assert found.bootstrap == pytest.approx((found.win_rate.low, found.win_rate.high), abs=0.015)


def test_people_judge_what_they_saw() -> None:
    prompt: list[Message] = [{"role": "user", "content": "?"}]
    both = {"p": sides(["mine", "same"], ["theirs", "other", "same"]), "q": sides(["x"], ["y"])}
    judgements = [
        ("p", Preference(prompt, said("mine"), said("theirs"))),
        ("p", Preference(prompt, said("other"), said("mine"))),
        ("p", Preference(prompt, said("theirs"), said("other"))),  # both of the second model
        ("p", Preference(prompt, said("same"), said("other"))),  # said by both models
        ("q", Ranking(prompt, [said("y"), said("z"), said("x")], [1, 1, 1])),
        ("r", Preference(prompt, said("x"), said("y"))),  # of no prompt that was asked
    ]
    found, unused = meetings_by_people(both, judgements)
    assert [(one.prompt, one.score) for one in found] == [(0, 1.0), (0, 0.0), (1, 0.5)]
    assert unused == 3
    assert found[0].length_gap == len("mine") - len("theirs")


def test_nothing_to_compare_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing to compare"):
        compare_models(NAMES, "judge", [], (1, 1))
