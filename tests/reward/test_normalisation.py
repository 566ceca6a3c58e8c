from __future__ import annotations

import math
from statistics import fmean, pstdev

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from reward.normalisation import NUM_QUANTILES, Normalisation

rewards = st.floats(-1e4, 1e4)
references = st.lists(rewards, min_size=2, max_size=200).filter(lambda values: pstdev(values) > 1e-6)


def test_a_worked_scale() -> None:
    # Mean of 2, 4, 4, 4, 5, 5, 7, 9 is 5, their deviation 2 (divided by 8, not 7).
    scale = Normalisation.fit([2, 4, 4, 4, 5, 5, 7, 9])
    assert (scale.mean, scale.std) == (5.0, 2.0)
    assert scale.reward(9) == 2.0
    assert scale.reward(4) == -0.5
    assert scale.quantiles[0] == -1.5
    assert scale.quantiles[50] == -0.25  # between the fourth and fifth of eight: 4 and 5
    assert scale.quantiles[100] == 2.0


def test_percentiles_of_an_even_spread() -> None:
    # 0 … 100 have deviation √(101² − 1)/√12 = √850.
    scale = Normalisation.fit(range(101))
    assert scale.std == pytest.approx(math.sqrt(850))
    for raw in (0, 1, 20, 20.5, 99.75, 100):
        assert scale.percentile(scale.reward(raw)) == pytest.approx(raw)
    assert scale.percentile(scale.reward(-0.1)) == 0.0
    assert scale.percentile(scale.reward(1e9)) == 100.0
    at = scale.at_percentile(20)
    assert at is not None
    assert at * scale.std + scale.mean == pytest.approx(20)


def test_a_run_of_equal_references_counts_half() -> None:
    scale = Normalisation(quantiles=(-1.0,) * 40 + (0.0,) * 21 + (1.0,) * 40)
    assert scale.percentile(0.0) == 50.0
    assert scale.percentile(-1.0) == 0.0
    assert scale.percentile(1.0) == 100.0
    assert scale.percentile(-0.5) == 39.5


def test_without_references_rewards_are_raw_and_have_no_percentile() -> None:
    scale = Normalisation()
    assert scale.reward(3.25) == 3.25
    assert scale.percentile(3.25) is None
    assert scale.at_percentile(20) is None


@given(references)
def test_the_references_themselves_get_mean_0_and_deviation_1(raw: list[float]) -> None:
    scale = Normalisation.fit(raw)
    normalised = [scale.reward(value) for value in raw]
    assert fmean(normalised) == pytest.approx(0, abs=1e-6)
    assert pstdev(normalised) == pytest.approx(1, abs=1e-6)
    assert len(scale.quantiles) == NUM_QUANTILES
    assert scale.quantiles[0] == pytest.approx(min(normalised))
    assert scale.quantiles[-1] == pytest.approx(max(normalised))


@given(references, rewards, rewards)
def test_more_reward_is_never_a_lower_percentile(raw: list[float], one: float, other: float) -> None:
    scale = Normalisation.fit(raw)
    lower, higher = (scale.percentile(scale.reward(value)) for value in sorted((one, other)))
    assert lower is not None
    assert higher is not None
    assert 0 <= lower <= higher <= 100


@given(references, st.floats(0, 100))
def test_percentile_and_at_percentile_undo_each_other(raw: list[float], percentile: float) -> None:
    scale = Normalisation.fit(raw)
    # Where references coincide many percentiles share a reward; and steps near rounding are no steps.
    assume(all(b - a > 1e-9 for a, b in zip(scale.quantiles, scale.quantiles[1:], strict=False)))
    reward = scale.at_percentile(percentile)
    assert reward is not None
    assert scale.percentile(reward) == pytest.approx(percentile, abs=1e-4)


@given(references, st.floats(0, 100), st.floats(0, 100))
def test_a_higher_percentile_never_asks_for_less(raw: list[float], one: float, other: float) -> None:
    scale = Normalisation.fit(raw)
    lower, higher = (scale.at_percentile(value) for value in sorted((one, other)))
    assert lower is not None
    assert higher is not None
    assert lower <= higher


@pytest.mark.parametrize("raw", [[], [1.0], [2.0, 2.0, 2.0]])
def test_a_scale_needs_two_different_references(raw: list[float]) -> None:
    with pytest.raises(ValueError, match="two different"):
        Normalisation.fit(raw)


@pytest.mark.parametrize(
    ("mean", "std", "quantiles", "problem"),
    [
        (math.nan, 1.0, (), "finite"),
        (0.0, math.inf, (), "finite"),
        (0.0, 0.0, (), "above 0"),
        (0.0, -1.0, (), "above 0"),
        (0.0, 1.0, (1.0, 2.0), "101 expected"),
        (0.0, 1.0, (1.0,) * 100 + (0.0,), "ascend"),
    ],
)
def test_an_impossible_scale_is_refused(mean: float, std: float, quantiles: tuple[float, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        Normalisation(mean, std, quantiles)


@pytest.mark.parametrize("percentile", [-0.1, 100.1, math.nan])
def test_percentiles_lie_between_0_and_100(percentile: float) -> None:
    with pytest.raises(ValueError, match="outside 0 to 100"):
        Normalisation().at_percentile(percentile)


def test_a_reference_that_is_not_a_number_is_refused() -> None:
    with pytest.raises(ValueError, match="finite"):
        Normalisation.fit([0.0, math.nan])
