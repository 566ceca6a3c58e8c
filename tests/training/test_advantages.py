"""Rewards and advantages against brute force and numbers worked by hand. Test names carry the detail they hold."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.advantages import (
    ScoreScale,
    explained_variance,
    generalised_advantages,
    penalise_missing_end,
    token_rewards,
    whiten,
)


def prefix_mask(lengths: list[int], width: int | None = None) -> Tensor:
    """(B, C) True for the first tokens of each row."""
    return torch.arange(width or max(lengths)) < torch.tensor(lengths)[:, None]


def brute_force(rewards: Tensor, values: Tensor, length: int, gamma: float, lam: float) -> list[float]:
    """Eq. 14 and 16 of the GAE paper as they stand: A_t = (1 − λ) Σ_k λ^(k−1) A_t^(k), each k-step estimate a sum."""

    def k_steps(t: int, k: int) -> float:
        total = sum(gamma**i * float(rewards[t + i]) for i in range(min(k, length - t)))
        after = float(values[t + k]) if t + k < length else 0.0
        return total + gamma**k * after - float(values[t])

    found = []
    for t in range(length):
        horizon = length - t
        # Past the end all estimates are the same one: their weights add up to λ^(horizon − 1).
        weighted = sum((1 - lam) * lam ** (k - 1) * k_steps(t, k) for k in range(1, horizon))
        found.append(weighted + lam ** (horizon - 1) * k_steps(t, horizon))
    return found


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=4),
    st.sampled_from([0.0, 0.5, 0.95, 1.0]),
    st.sampled_from([0.9, 1.0]),
    st.integers(0, 1000),
)
def test_p10_gae_equals_brute_force(lengths: list[int], lam: float, gamma: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = prefix_mask(lengths)
    rewards = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    values = torch.randn(mask.shape, generator=generator, dtype=torch.float64)
    found = generalised_advantages(rewards, values, mask, gamma, lam)
    for row, length in enumerate(lengths):
        expected = brute_force(rewards[row], values[row], length, gamma, lam)
        assert found.advantages[row, :length].tolist() == pytest.approx(expected, abs=1e-9)
        assert found.advantages[row, length:].abs().sum() == 0


def test_p10_returns_are_advantages_before_whitening_plus_old_values() -> None:
    mask = prefix_mask([3, 2])
    rewards, values = torch.tensor([[1.0, -1, 2], [4, 0, 9]]), torch.tensor([[0.5, 1, -1], [2, 3, 9]])
    found = generalised_advantages(rewards, values, mask, 1.0, 1.0)
    # λ = γ = 1: returns are the sums of the rewards to come, whatever the values.
    assert found.returns.tolist() == [[2.0, 1.0, 2.0], [4.0, 0.0, 0.0]]


def test_p10_the_next_value_is_that_of_the_next_token() -> None:
    """At λ = 0 an estimate is one step: an index off by one cannot hide in a telescope."""
    mask = prefix_mask([3])
    values = torch.tensor([[1.0, 10.0, 100.0]])
    found = generalised_advantages(torch.zeros(1, 3), values, mask, 1.0, 0.0)
    assert found.advantages.tolist() == [[9.0, 90.0, -100.0]]


def test_p7_the_score_is_given_once_on_the_last_real_token() -> None:
    mask = prefix_mask([1, 3], width=4)
    kl = torch.tensor([[0.5, 9, 9, 9], [0.1, -0.2, 0.3, 9]])
    rewards = token_rewards(torch.tensor([2.0, -1.0]), kl, mask, 0.1)
    expected = torch.tensor([[1.95, 0, 0, 0], [-0.01, 0.02, -1.03, 0]])
    assert torch.allclose(rewards, expected)


@given(st.lists(st.integers(1, 5), min_size=1, max_size=4), st.floats(0, 2), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_p7_rewards_and_penalties_sum_to_the_score(lengths: list[int], kl_coef: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    mask = prefix_mask(lengths, width=6)
    kl = torch.randn(mask.shape, generator=generator)
    scores = torch.randn(len(lengths), generator=generator)
    rewards = token_rewards(scores, kl, mask, kl_coef)
    back = (rewards + kl_coef * torch.where(mask, kl, 0.0)).sum(dim=1)
    assert torch.allclose(back, scores, atol=1e-5)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("none", [2.0, 3.0, -4.0]), ("subtract", [2.0, 2.0, -5.0]), ("replace", [2.0, -1.0, -1.0])],
)
def test_p8_missing_end_truth_table(mode: str, expected: list[float]) -> None:
    scores, ended = torch.tensor([2.0, 3.0, -4.0]), torch.tensor([True, False, False])
    assert penalise_missing_end(scores, ended, 1.0, mode).tolist() == expected  # type: ignore[arg-type]


def test_p9_nothing_behind_a_completion_counts() -> None:
    """NaN there changes nothing: products with a mask would spread it."""
    mask = prefix_mask([2, 4])
    clean = torch.randn(2, 4, generator=torch.Generator().manual_seed(1))
    dirty = torch.where(mask, clean, torch.nan)
    scores = torch.tensor([1.0, 2.0])
    for kl, values in ((clean, clean), (dirty, dirty)):
        rewards = token_rewards(scores, kl, mask, 0.3)
        found = generalised_advantages(rewards, values, mask, 0.99, 0.9)
        facts = [rewards, found.advantages, found.returns, whiten(found.advantages, mask)]
        facts.append(torch.tensor(explained_variance(values, found.returns, mask)))
        if kl is clean:
            expected = facts
    assert all(torch.equal(one, other) for one, other in zip(facts, expected, strict=True))
    assert all(torch.isfinite(one).all() for one in facts)


def test_p11_whitened_advantages_have_mean_0_and_deviation_1() -> None:
    mask = prefix_mask([3, 1, 5])
    values = torch.randn(3, 5, generator=torch.Generator().manual_seed(2)) * 7 + 40
    whitened = whiten(values, mask)
    kept = whitened[mask].double()
    assert float(kept.mean()) == pytest.approx(0, abs=1e-6)
    assert float(kept.square().mean()) == pytest.approx(1, abs=1e-5), "by the biased variance"
    assert whitened[~mask].abs().sum() == 0


def test_p11_whitening_by_hand() -> None:
    whitened = whiten(torch.tensor([[1.0, 3.0, 8.0]]), torch.tensor([[True, True, False]]))
    assert whitened.tolist() == [[pytest.approx(-1), pytest.approx(1), 0]]


def test_p11_whitened_rewards_keep_their_mean() -> None:
    mask = prefix_mask([4, 2])
    values = torch.randn(2, 4, generator=torch.Generator().manual_seed(3)) * 5 + 2
    whitened = whiten(values, mask, keep_mean=True)
    assert float(whitened[mask].mean()) == pytest.approx(float(values[mask].mean()), abs=1e-5)
    assert float(whitened[mask].double().var(correction=0)) == pytest.approx(1, abs=1e-5)


def test_tokens_that_are_all_alike_whiten_to_nought() -> None:
    assert whiten(torch.full((2, 2), 3.0), torch.ones(2, 2, dtype=torch.bool)).abs().max() == 0


def test_p22_scores_are_shifted_scaled_and_clipped_in_this_order() -> None:
    scale = ScoreScale(shift=1.0, scale=2.0, clip=3.0)
    assert scale.apply(torch.tensor([1.0, 2.0, 9.0, -9.0])).tolist() == [0.0, 2.0, 3.0, -3.0]


def test_explained_variance_of_a_perfect_a_constant_and_a_wrong_model() -> None:
    mask = prefix_mask([3])
    returns = torch.tensor([[1.0, 2.0, 3.0]])
    assert explained_variance(returns + 5, returns, mask) == pytest.approx(1)
    assert explained_variance(torch.zeros(1, 3), returns, mask) == pytest.approx(0)
    assert explained_variance(-returns, returns, mask) == pytest.approx(-3)
    assert explained_variance(returns, torch.ones(1, 3), mask) == 0


def test_a_mask_with_a_hole_or_an_empty_row_is_refused() -> None:
    kl = torch.zeros(1, 3)
    for mask in ([[True, False, True]], [[False, False, False]]):
        with pytest.raises(AssertionError):
            token_rewards(torch.zeros(1), kl, torch.tensor(mask), 0.1)
