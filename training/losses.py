"""Losses: pure tensor maths, no I/O.

Shapes: N completions, M pairs; B completions of C tokens.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def pairwise_ranking_loss(
    rewards: Tensor,
    better: Tensor,
    worse: Tensor,
    weights: Tensor,
    margins: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Bradley-Terry negative log likelihood of the comparisons, weighted and summed.

    loss = Σ_m weights_m · −log σ(r_better − r_worse − margin_m)

    InstructGPT (arXiv 2203.02155, eq. 1) with weights 1/C(K,2) within a prompt; the margin is Llama 2's
    (arXiv 2307.09288, eq. 2). `rewards` (N,); `better`, `worse` (M,) positions in it; `weights`, `margins` (M,).
    Each completion is encoded once however many pairs it stands in. Returns a scalar, in fp32.

    With `label_smoothing` ε every comparison is held to be the wrong way round with probability ε, as
    conservative DPO has it: (1 − ε) · −log σ(gap) + ε · −log σ(−gap), where gap is less the margin.
    """
    assert rewards.ndim == 1
    assert 0 <= label_smoothing < 0.5
    assert better.shape == worse.shape == weights.shape
    gaps = rewards.float()[better] - rewards.float()[worse]  # (M,)
    if margins is not None:
        gaps = gaps - margins
    # softplus(−x) = −log σ(x), without the overflow that log(1 + exp(−x)) has.
    losses = F.softplus(-gaps)
    if label_smoothing:
        # −log σ(−gap) = −log σ(gap) + gap
        losses = losses + label_smoothing * gaps
    return (weights * losses).sum()


def centering_loss(rewards: Tensor, better: Tensor, worse: Tensor, weights: Tensor) -> Tensor:
    """Σ_m weights_m · (r_better + r_worse)²: keeps rewards near 0 across prompts, which Bradley-Terry leaves open.

    Eisenstein et al. (arXiv 2312.09244, section 2). Shapes as in `pairwise_ranking_loss`.
    """
    sums = rewards.float()[better] + rewards.float()[worse]
    return (weights * sums.square()).sum()


def num_correct(rewards: Tensor, better: Tensor, worse: Tensor) -> Tensor:
    """Pairs whose better completion has the higher reward; equal rewards count half. A scalar."""
    gaps = rewards[better] - rewards[worse]
    return (gaps > 0).sum() + 0.5 * (gaps == 0).sum()


def clipped_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, completion_mask: Tensor, clip_range: float
) -> Tensor:
    """PPO's clipped surrogate (Schulman et al., arXiv 1707.06347, eq. 7), to be minimised, summed over tokens.

    loss = Σ max(−A · ρ, −A · clip(ρ, 1 − ε, 1 + ε)),  ρ = π(a) / π_old(a)

    All (B, C). A sum: the caller divides by the count over all micro-batches and processes. What stands outside the
    mask is not read, be it NaN.
    """
    assert logprobs.shape == old_logprobs.shape == advantages.shape == completion_mask.shape
    ratio = torch.where(completion_mask, logprobs - old_logprobs, 0.0).exp()
    weights = torch.where(completion_mask, advantages, 0.0)
    return torch.maximum(-weights * ratio, -weights * ratio.clamp(1 - clip_range, 1 + clip_range)).sum()


def clipped_value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, completion_mask: Tensor, clip_range: float | None
) -> Tensor:
    """½ Σ max((V − R)², (clip(V, V_old ± ε) − R)²): squared error that pays no one for leaving V_old far behind.

    As Ziegler et al. (arXiv 1909.08593, released code) have it; without `clip_range` the plain squared error. All
    (B, C); summed as `clipped_policy_loss` is.
    """
    assert values.shape == old_values.shape == returns.shape == completion_mask.shape
    kept, old, wanted = (torch.where(completion_mask, one, 0.0) for one in (values, old_values, returns))
    errors = (kept - wanted).square()
    if clip_range is not None:
        clipped = old + (kept - old).clamp(-clip_range, clip_range)
        errors = torch.maximum(errors, (clipped - wanted).square())
    return 0.5 * errors.sum()


def dpo_losses(
    chosen_logratios: Tensor,
    rejected_logratios: Tensor,
    beta: float,
    *,
    margins: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Direct preference optimisation, pair by pair: (M,), in fp32.

    loss = −log σ(β · (log π(y_w|x)/π_ref(y_w|x) − log π(y_l|x)/π_ref(y_l|x)))

    Rafailov et al. (arXiv 2305.18290, eq. 7). `chosen_logratios`, `rejected_logratios` (M,): log π − log π_ref, summed
    over the tokens of the completion. With `label_smoothing` ε each pair is held to be the wrong way round with
    probability ε (Mitchell 2023, conservative DPO, eq. 3). `margins` (M,): taken off β times the difference, as in DPO
    with an offset (Amini et al., arXiv 2402.10571, eq. 8).
    """
    assert chosen_logratios.shape == rejected_logratios.shape
    assert beta > 0 and 0 <= label_smoothing < 0.5
    gaps = beta * (chosen_logratios.float() - rejected_logratios.float())
    if margins is not None:
        gaps = gaps - margins
    # −log σ(x) = softplus(−x), and softplus(x) = softplus(−x) + x
    return F.softplus(-gaps) + label_smoothing * gaps
