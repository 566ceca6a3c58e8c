"""Losses against numbers worked by hand, and the identities they promise."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from training.losses import centering_loss, num_correct, pairwise_ranking_loss


def ids(*positions: int) -> Tensor:
    return torch.tensor(positions)


def ones(count: int) -> Tensor:
    return torch.ones(count)


def test_one_pair_by_hand() -> None:
    # −log σ(2 − 0.5) = log(1 + e^−1.5)
    loss = pairwise_ranking_loss(torch.tensor([2.0, 0.5]), ids(0), ids(1), ones(1))
    assert loss.item() == pytest.approx(0.2014132779827524)


def test_equal_rewards_cost_log_two() -> None:
    loss = pairwise_ranking_loss(torch.tensor([0.7, 0.7]), ids(0), ids(1), ones(1))
    assert loss.item() == pytest.approx(math.log(2))


def test_margin_is_taken_off_the_gap() -> None:
    rewards = torch.tensor([2.0, 0.5])
    with_margin = pairwise_ranking_loss(rewards, ids(0), ids(1), ones(1), margins=torch.tensor([1.0]))
    # −log σ(2 − 0.5 − 1)
    assert with_margin.item() == pytest.approx(0.4740769841801067)


def test_weights_multiply_and_the_result_is_a_sum() -> None:
    rewards = torch.tensor([1.0, 0.0, -1.0])
    loss = pairwise_ranking_loss(rewards, ids(0, 0), ids(1, 2), torch.tensor([0.5, 2.0]))
    # 0.5 · log(1 + e^−1) + 2 · log(1 + e^−2)
    assert loss.item() == pytest.approx(0.5 * 0.31326168751822286 + 2 * 0.1269280110429726)


def test_label_smoothing_by_hand() -> None:
    rewards = torch.tensor([2.0, 0.5])
    smoothed = pairwise_ranking_loss(rewards, ids(0), ids(1), ones(1), label_smoothing=0.1)
    # 0.9 · −log σ(1.5) + 0.1 · −log σ(−1.5)
    assert smoothed.item() == pytest.approx(0.9 * 0.2014132779827524 + 0.1 * 1.7014132779827524)


def test_label_smoothing_wants_a_finite_gap() -> None:
    """At odds of (1 − ε) : ε there is nothing left to gain."""
    rewards = torch.tensor([math.log(9), 0.0], requires_grad=True)
    pairwise_ranking_loss(rewards, ids(0), ids(1), ones(1), label_smoothing=0.1).backward()  # type: ignore[no-untyped-call]
    assert rewards.grad is not None
    assert rewards.grad.abs().max().item() < 1e-6


@pytest.mark.parametrize("gap", [1e4, -1e4])
def test_huge_differences_stay_finite(gap: float) -> None:
    """R4: −log σ in its stable form."""
    rewards = torch.tensor([gap, 0.0], requires_grad=True)
    loss = pairwise_ranking_loss(rewards, ids(0), ids(1), ones(1))
    loss.backward()  # type: ignore[no-untyped-call]
    assert loss.item() == pytest.approx(max(0.0, -gap))
    assert rewards.grad is not None
    assert torch.isfinite(rewards.grad).all()


def test_half_precision_rewards_are_summed_in_full() -> None:
    rewards = torch.tensor([3.0, 1.0], dtype=torch.bfloat16)
    loss = pairwise_ranking_loss(rewards, ids(0), ids(1), ones(1))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(0.12692801)


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=6))
def test_k_wise_equals_the_mean_over_pairs_encoded_apart(values: list[float]) -> None:
    """R5: K forwards give the loss and gradient that K(K−1) forwards would."""
    count = len(values)
    pairs = [(i, j) for i in range(count) for j in range(i + 1, count)]
    features = torch.eye(count, dtype=torch.float64)
    scorer = torch.tensor(values, dtype=torch.float64, requires_grad=True)

    weights = torch.full((len(pairs),), 1 / len(pairs))
    better, worse = ids(*(i for i, _ in pairs)), ids(*(j for _, j in pairs))
    together = pairwise_ranking_loss(features @ scorer, better, worse, weights)
    (gradient,) = torch.autograd.grad(together, scorer)

    apart = torch.stack(
        [pairwise_ranking_loss(features[[i, j]] @ scorer, ids(0), ids(1), ones(1)) for i, j in pairs]
    ).mean()
    (gradient_apart,) = torch.autograd.grad(apart, scorer)
    assert together.item() == pytest.approx(apart.item(), abs=1e-6)
    assert torch.allclose(gradient, gradient_apart, atol=1e-6)


@given(st.lists(st.floats(-5, 5, width=32), min_size=2, max_size=5), st.floats(-100, 100, width=16))
def test_only_differences_count(values: list[float], shift: float) -> None:
    rewards = torch.tensor(values, dtype=torch.float32)
    better, worse, weights = ids(*range(len(values) - 1)), ids(*range(1, len(values))), ones(len(values) - 1)
    moved = pairwise_ranking_loss(rewards + shift, better, worse, weights)
    assert moved.item() == pytest.approx(pairwise_ranking_loss(rewards, better, worse, weights).item(), rel=1e-3)


def test_centring_by_hand() -> None:
    rewards = torch.tensor([2.0, 1.0, -2.0])
    # 1 · (2 + 1)² + 0.5 · (2 − 2)²
    assert centering_loss(rewards, ids(0, 0), ids(1, 2), torch.tensor([1.0, 0.5])).item() == pytest.approx(9.0)


def test_centring_pulls_towards_nought() -> None:
    rewards = torch.tensor([4.0, 2.0], requires_grad=True)
    centering_loss(rewards, ids(0), ids(1), ones(1)).backward()  # type: ignore[no-untyped-call]
    assert rewards.grad is not None
    assert (rewards.grad > 0).all()


def test_correct_pairs_with_ties_as_halves() -> None:
    rewards = torch.tensor([1.0, 0.0, 1.0])
    assert num_correct(rewards, ids(0, 1, 0), ids(1, 0, 2)).item() == 1.5
