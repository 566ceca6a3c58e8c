"""Heads on frozen features: they are optimal, repeatable, and gates tell opposite domains apart."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from torch import Tensor

from training.heads import FittedHead, HeadData, domain_indices, fit_head
from training.losses import pairwise_ranking_loss
from training.models import gated_head
from training.options import HeadFitOptions

PENALTY = 1e-3
ONE_PENALTY = HeadFitOptions(l2=[PENALTY], gate_l2=[1e-4])


def synthetic(
    num_groups: int = 120, width: int = 6, num_domains: int = 1, noise: float = 0.5, seed: int = 0
) -> HeadData:
    """Two completions a group. Domain 0 rewards the first feature, domain 1 punishes it; prompts tell the domain."""
    generator = torch.Generator().manual_seed(seed)
    domain = torch.arange(num_groups) % num_domains
    features = torch.randn(2 * num_groups, width, generator=generator)
    prompts = 0.3 * torch.randn(num_groups, 4, generator=generator)
    prompts[:, 0] += 1.0 - 2.0 * domain
    taste = (1.0 - 2.0 * domain).repeat_interleave(2) * features[:, 0]
    taste = taste + noise * torch.randn(2 * num_groups, generator=generator)
    first, second = torch.arange(0, 2 * num_groups, 2), torch.arange(1, 2 * num_groups, 2)
    first_wins = taste[first] > taste[second]
    return HeadData(
        features=features,
        prompt_features=prompts,
        better=torch.where(first_wins, first, second),
        worse=torch.where(first_wins, second, first),
        weights=torch.ones(num_groups),
        margins=torch.zeros(num_groups),
        pair_group=torch.arange(num_groups),
        completion_group=torch.arange(num_groups).repeat_interleave(2),
        group_fold=torch.arange(num_groups) // num_domains % 5,
        group_domain=domain,
        gate_features=torch.empty(0, prompts.shape[1]),
        gate_fold=torch.empty(0, dtype=torch.long),
        gate_domain=torch.empty(0, dtype=torch.long),
    )


def test_unjudged_prompts_teach_the_gate_alone() -> None:
    data = synthetic(num_domains=2)
    shift = torch.zeros(1, data.prompt_features.shape[1])
    shift[0, 1] = 5.0
    plain = fit_head(data, 2, HeadFitOptions())
    more = replace(
        data,
        gate_features=data.prompt_features[:40] + shift,
        gate_fold=torch.arange(40) % 5,
        gate_domain=torch.ones(40, dtype=torch.long),
    )
    taught = fit_head(more, 2, HeadFitOptions())
    assert torch.equal(taught.weight, plain.weight)
    assert taught.gate_weight is not None
    assert plain.gate_weight is not None
    unseen = data.prompt_features[40:80] + shift
    share = (unseen @ taught.gate_weight.T + taught.gate_bias).softmax(-1)[:, 1]
    assert share.mean() > 0.9
    assert (unseen @ plain.gate_weight.T + plain.gate_bias).softmax(-1)[:, 1].mean() < 0.7


def rewards(fitted: FittedHead, data: HeadData) -> Tensor:
    if fitted.gate_weight is None or fitted.gate_bias is None:
        return data.features @ fitted.weight[0] + fitted.bias[0]
    head = gated_head((fitted.weight, fitted.bias), (fitted.gate_weight, fitted.gate_bias))
    with torch.no_grad():
        prompts = data.prompt_features[data.completion_group]
        return head(data.features, prompts).squeeze(-1)  # type: ignore[no-any-return]


def accuracy(fitted: FittedHead, data: HeadData) -> float:
    found = rewards(fitted, data)
    return float((found[data.better] > found[data.worse]).double().mean())


def scale_of(data: HeadData) -> Tensor:
    """The units in which the penalty is meant: deviations of the features, and one for their number."""
    scale: Tensor = data.features.std(dim=0) * data.features.shape[1] ** 0.5
    return scale


def direction(weight: Tensor) -> Tensor:
    unit: Tensor = weight / weight.norm()
    return unit


def test_the_gradient_vanishes_at_the_solution() -> None:
    data = synthetic()
    fitted = fit_head(data, 1, ONE_PENALTY)
    # Calibration multiplies the optimum by one factor: the optimum lies on the ray through the fitted weights.
    ray = (fitted.weight[0] * scale_of(data)).double()
    scaled = (data.features / scale_of(data)).double()

    def loss(factor: Tensor, offset: Tensor) -> Tensor:
        weight = ray * factor + offset
        ranking = pairwise_ranking_loss(scaled @ weight, data.better, data.worse, data.weights / data.weights.sum())
        return ranking + PENALTY * weight.square().sum()

    factors = torch.linspace(0.2, 3.0, 2000, dtype=torch.float64)
    nought = torch.zeros_like(ray)
    best = factors[torch.stack([loss(factor, nought) for factor in factors]).argmin()]
    offset = nought.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(best, offset), offset)
    assert gradient.abs().max() < 1e-4


def test_equals_logistic_regression_without_offset() -> None:
    data = synthetic()
    fitted = fit_head(data, 1, ONE_PENALTY)
    gaps = ((data.features[data.better] - data.features[data.worse]) / scale_of(data)).numpy()
    # sklearn minimises |w|²/2 + C · Σ loss; ours is Σ loss / n + λ · |w|², so C = 1 / (2 · λ · n).
    reference = LogisticRegression(C=1 / (2 * PENALTY * len(gaps)), fit_intercept=False, tol=1e-8, max_iter=1000)
    reference.fit(np.vstack([gaps, -gaps]), np.repeat([1, 0], len(gaps)), sample_weight=np.full(2 * len(gaps), 0.5))
    expected = torch.tensor(reference.coef_[0], dtype=torch.float32)
    ours = fitted.weight[0] * scale_of(data)
    assert torch.allclose(direction(ours), direction(expected), atol=1e-3)


def test_margins_make_the_head_steeper() -> None:
    data = synthetic()
    easy, hard = (fit_head(replace(data, margins=torch.full((120,), m)), 1, ONE_PENALTY) for m in (0.0, 2.0))
    assert hard.weight.norm() > 0
    assert not torch.allclose(direction(easy.weight[0]), direction(hard.weight[0]), atol=1e-4)


def test_pairs_without_weight_do_not_count() -> None:
    data = synthetic()
    corrupted = replace(
        data,
        better=torch.cat([data.better, data.worse[:40]]),
        worse=torch.cat([data.worse, data.better[:40]]),
        weights=torch.cat([data.weights, torch.zeros(40)]),
        margins=torch.zeros(160),
        pair_group=torch.cat([data.pair_group, data.pair_group[:40]]),
    )
    fitted, expected = fit_head(corrupted, 1, ONE_PENALTY), fit_head(data, 1, ONE_PENALTY)
    assert torch.allclose(fitted.weight, expected.weight, rtol=1e-3, atol=1e-3)


def test_the_same_data_give_the_same_head() -> None:
    first, second = (fit_head(synthetic(num_domains=2), 2, HeadFitOptions()) for _ in range(2))
    assert torch.equal(first.weight, second.weight)
    assert torch.equal(first.bias, second.bias)
    assert first.gate_weight is not None
    assert second.gate_weight is not None
    assert torch.equal(first.gate_weight, second.gate_weight)
    assert (first.l2, first.gate_l2) == (second.l2, second.gate_l2)


def test_the_penalty_comes_from_cross_validation() -> None:
    noisy = fit_head(synthetic(noise=20.0, width=40), 1, HeadFitOptions(l2=[1e-6, 1e2]))
    clean = fit_head(synthetic(noise=0.0), 1, HeadFitOptions(l2=[1e-6, 1e2]))
    assert noisy.l2 == [1e2]
    assert clean.l2 == [1e-6]


def test_a_gate_solves_opposite_domains_and_a_single_head_cannot() -> None:
    train = synthetic(240, num_domains=2, noise=0.1)
    held_out = synthetic(200, num_domains=2, noise=0.1, seed=1)
    assert accuracy(fit_head(train, 2, HeadFitOptions()), held_out) > 0.9
    together = replace(train, group_domain=torch.zeros(240, dtype=torch.long))
    assert accuracy(fit_head(together, 1, HeadFitOptions()), held_out) < 0.65


def test_each_domains_rewards_average_nought() -> None:
    data = synthetic(num_domains=2)
    data = replace(data, features=data.features + 7.0)
    fitted = fit_head(data, 2, HeadFitOptions())
    for domain in range(2):
        own = data.features[data.group_domain[data.completion_group] == domain]
        assert (own @ fitted.weight[domain] + fitted.bias[domain]).mean().item() == pytest.approx(0.0, abs=1e-3)


def test_units_of_the_features_do_not_matter() -> None:
    data = synthetic(num_domains=2)
    units = torch.tensor([1e-3, 1.0, 10.0, 1e2, 5.0, 0.1])
    other = replace(data, features=data.features * units, prompt_features=data.prompt_features * 30.0)
    plain, scaled = fit_head(data, 2, HeadFitOptions()), fit_head(other, 2, HeadFitOptions())
    assert plain.l2 == scaled.l2
    assert torch.allclose(rewards(plain, data), rewards(scaled, other), atol=5e-3)


def test_domains_speak_of_the_same_odds() -> None:
    """Held-out log odds: σ(gap) of a noisy domain is near its accuracy, not far above it."""
    train, held_out = synthetic(400, noise=1.5), synthetic(400, noise=1.5, seed=1)
    fitted = fit_head(train, 1, HeadFitOptions())
    found = rewards(fitted, held_out)
    gaps = found[held_out.better] - found[held_out.worse]
    confidence = torch.sigmoid(gaps.abs()).mean().item()
    assert confidence == pytest.approx(accuracy(fitted, held_out), abs=0.06)


def test_domains_are_sources_in_order() -> None:
    assert domain_indices(["b", "a", "b"], gated=True) == (["a", "b"], [1, 0, 1])
    assert domain_indices(["b", "a"], gated=False) == (["all"], [0, 0])
