"""Heads on a frozen base, fitted to convergence: no learning rate, no epochs, the same result every time.

A linear head under the Bradley-Terry loss is a logistic regression on feature differences, so L-BFGS finds
its optimum in seconds; the L2 penalty comes from cross-validation over prompts. A gated head is one such
regression for each domain and a multinomial one, on features of the prompt alone, that weighs them.

Why domains: what people reward in one (refuse, when asked for harm) they punish in another (refuse, when
asked for help), and a single linear head on the mixture does worse on each than its own head would.
Mixtures of reward heads by a gate on the prompt: Wang et al., ArmoRM (arXiv 2406.12845, section 3.2).

Shapes: N completions, D their features, G groups (prompts), P prompt features, E domains, M pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from training.losses import pairwise_ranking_loss
from training.options import HeadFitOptions


@dataclass(frozen=True, slots=True)
class HeadData:
    """Everything a fit needs, for the groups of one split."""

    features: Tensor  # (N, D) pooled hidden states
    prompt_features: Tensor  # (G, P) pooled hidden states of the prompts
    better: Tensor  # (M,) positions in features
    worse: Tensor  # (M,)
    weights: Tensor  # (M,) what each pair counts
    margins: Tensor  # (M,)
    pair_group: Tensor  # (M,) the group of each pair
    completion_group: Tensor  # (N,) the group of each completion
    group_fold: Tensor  # (G,) cross-validation fold; a prompt is in one
    group_domain: Tensor  # (G,) domain of each group, 0 … E−1
    gate_features: Tensor  # (X, P) prompts without comparisons, for the gate alone; X may be 0
    gate_fold: Tensor  # (X,)
    gate_domain: Tensor  # (X,)


@dataclass(frozen=True, slots=True)
class FittedHead:
    """Weights in the units of the unscaled features."""

    weight: Tensor  # (E, D)
    bias: Tensor  # (E,)
    gate_weight: Tensor | None  # (E, P); None with one domain
    gate_bias: Tensor | None  # (E,)
    l2: list[float]
    """The penalty chosen for each domain."""
    gate_l2: float | None


def fit_head(data: HeadData, num_domains: int, options: HeadFitOptions) -> FittedHead:
    """Fits one linear head a domain, and the gate where there are several.

    Each domain's rewards are scaled to be calibrated on held-out folds (so that domains speak of the same odds)
    and shifted to average 0 over the domain's completions (so that a threshold means the same in each).
    """
    scale = data.features.std(dim=0).clamp(min=1e-6) * math.sqrt(data.features.shape[1])  # (D,)
    features = data.features / scale
    weights, biases, penalties = [], [], []
    for domain in range(num_domains):
        pairs = data.group_domain[data.pair_group] == domain  # (M,)
        weight, penalty = _fit_domain(features, data, pairs, options)
        own = features[data.group_domain[data.completion_group] == domain]
        weights.append(weight / scale)
        biases.append(-(own @ weight).mean())
        penalties.append(penalty)
    if num_domains == 1:
        return FittedHead(torch.stack(weights), torch.stack(biases), None, None, penalties, None)
    gate_weight, gate_bias, gate_l2 = _fit_gate(data, num_domains, options)
    return FittedHead(torch.stack(weights), torch.stack(biases), gate_weight, gate_bias, penalties, gate_l2)


def _fit_domain(features: Tensor, data: HeadData, pairs: Tensor, options: HeadFitOptions) -> tuple[Tensor, float]:
    """The (D,) weights of one domain's head, calibrated, and the penalty that cross-validation chose."""
    gaps = features[data.better[pairs]] - features[data.worse[pairs]]  # (m, D)
    weights, margins = data.weights[pairs], data.margins[pairs]
    folds = data.group_fold[data.pair_group[pairs]]
    best: tuple[float, float, float] | None = None
    for penalty in options.l2:
        held_out = torch.zeros(len(gaps))
        for fold in range(options.folds):
            kept = folds != fold
            if not kept.any() or kept.all():
                continue
            held_out[~kept] = gaps[~kept] @ _fit_linear(gaps[kept], weights[kept], margins[kept], penalty)
        factor, loss = _calibrate(held_out, weights)
        if best is None or loss < best[0]:
            best = (loss, penalty, factor)
    assert best is not None, "OptionsError would have refused an empty list of penalties"
    _, penalty, factor = best
    return _fit_linear(gaps, weights, margins, penalty) * factor, penalty


def _fit_linear(gaps: Tensor, weights: Tensor, margins: Tensor, penalty: float) -> Tensor:
    """argmin_w of the weighted mean Bradley-Terry loss + penalty · |w|², (D,)."""
    ones = torch.ones(len(gaps), dtype=torch.long)
    positions = torch.arange(len(gaps))
    total = weights.sum()

    def loss(parameters: Tensor) -> Tensor:
        # The gaps are the rewards of "better" against a "worse" of 0.
        rewards = torch.cat([gaps @ parameters, parameters.new_zeros(1)])
        ranking = pairwise_ranking_loss(rewards, positions, ones * len(gaps), weights / total, margins)
        return ranking + penalty * parameters.square().sum()

    return _minimise(loss, torch.zeros(gaps.shape[1]))


def _calibrate(held_out: Tensor, weights: Tensor) -> tuple[float, float]:
    """(factor, loss): the factor on held-out gaps under which they are the log odds best (Platt scaling), its loss."""
    total = weights.sum()

    def loss(log_factor: Tensor) -> Tensor:
        return (weights * F.softplus(-log_factor.exp() * held_out)).sum() / total

    # A head that knows nothing would be scaled to nothing and its domain would vanish: within e^±3.
    log_factor = _minimise(lambda x: loss(x[0].clamp(-3, 3)), torch.zeros(1))
    factor = float(log_factor[0].clamp(-3, 3).exp())
    return factor, float(loss(torch.tensor(math.log(factor))))


def _fit_gate(data: HeadData, num_domains: int, options: HeadFitOptions) -> tuple[Tensor, Tensor, float]:
    """Multinomial logistic regression of the domain on the prompt: (E, P), (E,), chosen penalty."""
    prompts = torch.cat([data.prompt_features, data.gate_features])
    mean = prompts.mean(dim=0)
    scale = prompts.std(dim=0).clamp(min=1e-6) * math.sqrt(prompts.shape[1])
    inputs = (prompts - mean) / scale  # (G + X, P)
    labels = torch.cat([data.group_domain, data.gate_domain])
    folds = torch.cat([data.group_fold, data.gate_fold])
    # Domains count alike, however many prompts each happens to have.
    balance = len(labels) / (num_domains * torch.bincount(labels, minlength=num_domains).clamp(min=1))
    width = inputs.shape[1]

    def fit(rows: Tensor, penalty: float) -> tuple[Tensor, Tensor]:
        def loss(parameters: Tensor) -> Tensor:
            matrix = parameters[:-num_domains].view(num_domains, width)
            logits = inputs[rows] @ matrix.T + parameters[-num_domains:]
            return F.cross_entropy(logits, labels[rows], weight=balance) + penalty * matrix.square().sum()

        found = _minimise(loss, torch.zeros(num_domains * width + num_domains))
        return found[:-num_domains].view(num_domains, width), found[-num_domains:]

    losses = []
    for penalty in options.gate_l2:
        logits = torch.zeros(len(labels), num_domains)
        for fold in range(options.folds):
            kept = folds != fold
            if not kept.any() or kept.all():
                continue
            matrix, offset = fit(kept, penalty)
            logits[~kept] = inputs[~kept] @ matrix.T + offset
        losses.append(float(F.cross_entropy(logits, labels, weight=balance)))
    penalty = options.gate_l2[losses.index(min(losses))]
    matrix, offset = fit(torch.ones(len(labels), dtype=torch.bool), penalty)
    matrix = matrix / scale
    return matrix, offset - matrix @ mean, penalty


def _minimise(loss: Callable[[Tensor], Tensor], start: Tensor, max_iterations: int = 200) -> Tensor:
    """L-BFGS with a line search (Nocedal & Wright, algorithm 7.5), from `start` to convergence."""
    parameters = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [parameters], max_iter=max_iterations, tolerance_grad=1e-6, line_search_fn="strong_wolfe"
    )

    def closure() -> float:
        optimizer.zero_grad()
        value = loss(parameters)
        value.backward()  # type: ignore[no-untyped-call]
        return float(value.detach())

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    return parameters.detach()


def domain_indices(sources: Sequence[str], gated: bool) -> tuple[list[str], list[int]]:
    """(domains, domain of each group): one a source in alphabetical order, or a single one."""
    if not gated:
        return ["all"], [0] * len(sources)
    domains = sorted(set(sources))
    return domains, [domains.index(source) for source in sources]
