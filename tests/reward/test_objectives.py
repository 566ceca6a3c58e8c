"""The rule by which rewards for several objectives become one, by hand and as promised."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from reward.normalisation import Normalisation
from reward.objective_head import constrained
from reward.objectives import BOTTOM, LEAST_ACCEPTED, MOST_REFUSED, ObjectiveChoice, ObjectiveRule, rule_for

INFINITE = float("inf")
SCALES = {"helpful": Normalisation.fit([0.0, 1.0, 2.0]), "harmless": Normalisation.fit([-4.0, 0.0, 4.0])}
REWARDS = st.floats(-6, 6, width=32)


def reward(rewards: list[float], weights: list[float], floors: list[float]) -> float:
    """Of one completion."""
    return constrained(torch.tensor([rewards]), torch.tensor(weights), torch.tensor(floors)).item()


@pytest.mark.parametrize(
    ("rewards", "expected"),
    [
        ([1.5, 0.0], 1.5),  # at the floor is not under it
        ([-2.5, 3.0], -2.5),
        ([-4.0, 3.0], -3 + 0.36787944 - 1),  # squeezed: −3 + e^(−1) − 1
        ([9.0, -0.25], -5.25),
        ([9.0, -2.0], -7.0),
    ],
)
def test_by_hand(rewards: list[float], expected: float) -> None:
    assert reward(rewards, [1.0, 0.0], [-INFINITE, 0.0]) == pytest.approx(expected)


def test_the_floor_that_is_missed_most_decides() -> None:
    assert reward([-1.0, -3.0, 5.0], [0.0, 0.0, 1.0], [0.0, 0.0, -INFINITE]) == pytest.approx(MOST_REFUSED - 3.0)


@given(st.lists(st.tuples(REWARDS, REWARDS), min_size=2, max_size=8), st.floats(-2, 2, width=32))
def test_the_most_wanted_of_those_above_the_floor_is_first(pairs: list[tuple[float, float]], floor: float) -> None:
    rewards = torch.tensor(pairs)
    made = constrained(rewards, torch.tensor([1.0, 0.0]), torch.tensor([-INFINITE, floor]))
    for (wanted, safe), own in zip(rewards.tolist(), made.tolist(), strict=True):
        assert own >= LEAST_ACCEPTED if safe >= floor else own < LEAST_ACCEPTED
        if safe >= floor and wanted >= BOTTOM:
            assert own == pytest.approx(wanted, abs=1e-5)
    met = rewards[:, 1] >= floor
    best = int(made.argmax())
    if met.any():
        assert met[best]
        assert rewards[best, 0] == pytest.approx(rewards[met, 0].max().item(), abs=1e-4)
    else:
        assert rewards[best, 1] == pytest.approx(rewards[:, 1].max().item(), abs=1e-5)


@given(REWARDS, REWARDS, st.floats(0, 3, width=32), st.floats(-2, 2, width=32))
def test_more_of_what_is_wanted_never_costs(wanted: float, safe: float, more: float, floor: float) -> None:
    weights, floors = [0.25, 0.75], [-INFINITE, floor]
    before = reward([wanted, safe], weights, floors)
    assert reward([wanted + more, safe], weights, floors) >= before - 1e-5
    assert reward([wanted, safe + more], weights, floors) >= before - 1e-5


def test_a_rule_is_filled_in() -> None:
    unbound = rule_for(ObjectiveChoice(floors={}), SCALES)
    assert unbound == ObjectiveRule({"helpful": 1.0, "harmless": 1.0}, {})
    gated = rule_for(ObjectiveChoice(floors={"harmless": "p50"}), SCALES)
    assert gated == ObjectiveRule({"helpful": 1.0}, {"harmless": 0.0})
    other = rule_for(ObjectiveChoice(floors={"harmless": -1}), SCALES, gated)
    assert other == ObjectiveRule({"helpful": 1.0}, {"harmless": -1.0})
    assert rule_for(ObjectiveChoice(weights={"harmless": 2.0}), SCALES, gated) == ObjectiveRule(
        {"harmless": 2.0}, {"harmless": 0.0}
    )


@pytest.mark.parametrize(
    ("choice", "problem"),
    [
        (ObjectiveChoice(floors={"honest": 0.0}), "floors.honest: no such objective; there are helpful, harmless"),
        (ObjectiveChoice(weights={"honest": 1.0}), "objective_weights.honest: no such objective"),
        (ObjectiveChoice(weights={"helpful": 0.0}), "objective_weights.helpful: 0.0 must be a number over 0"),
        (ObjectiveChoice(floors={"harmless": "p101"}), "floors.harmless: 'p101' must be a number or a percentile"),
        (ObjectiveChoice(floors={"harmless": "low"}), "floors.harmless: 'low'"),
    ],
)
def test_a_rule_that_cannot_be_is_named(choice: ObjectiveChoice, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        rule_for(choice, SCALES)


@pytest.mark.parametrize("floor", [float("nan"), float("inf"), -float("inf")])
def test_a_floor_that_is_no_number_is_refused(floor: float) -> None:
    with pytest.raises(ValueError, match=r"floors\.a: .* must be a number"):
        rule_for(ObjectiveChoice(None, {"a": floor}), {"a": Normalisation(), "b": Normalisation()})
