"""How far the policy is from its reference: estimators per token, and the controllers of the penalty's weight.

Shapes: B completions, C completion tokens, V vocabulary. KL is that of the policy from the reference,
KL(π ‖ π_ref), in nats.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol, Self

import torch
from torch import Tensor

ERROR_BOUND = 0.2
"""The adaptive controller never reacts to more than so large a relative error (Ziegler et al., section 2.2)."""


def k1(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """log π(a) − log π_ref(a) of the sampled tokens, in their shape: unbiased, of either sign.

    The penalty of InstructGPT (arXiv 2203.02155, eq. 2) and of Ziegler et al. (arXiv 1909.08593, eq. 2). Its
    gradient through the reward is the KL's; that of k3, of a clamped or of an averaged one is something else.
    Schulman's names for the estimators: joschu.net/blog/kl-approx.html.
    """
    return logprobs - ref_logprobs


def k3(logprobs: Tensor, ref_logprobs: Tensor) -> Tensor:
    """exp(−k1) − 1 + k1: unbiased and never negative. To look at; as a reward it has another optimum."""
    log_ratio = ref_logprobs - logprobs
    return torch.expm1(log_ratio) - log_ratio


def exact_kl(log_policy: Tensor, log_reference: Tensor) -> Tensor:
    """Σ_v π(v) · (log π(v) − log π_ref(v)) at each position: (…, V) normalised log-probabilities -> (…).

    Tokens that the policy never gives count 0, also where the reference never gives them.
    """
    assert log_policy.shape == log_reference.shape
    terms = log_policy.exp() * (log_policy - log_reference)
    return torch.where(log_policy == -torch.inf, 0.0, terms).sum(dim=-1)


def entropy_of(log_policy: Tensor) -> Tensor:
    """−Σ_v π(v) · log π(v) at each position, in nats: (…, V) -> (…)."""
    return -torch.where(log_policy == -torch.inf, 0.0, log_policy.exp() * log_policy).sum(dim=-1)


class KLController(Protocol):
    """Says what a nat of KL costs. Updated once a batch of completions."""

    @property
    def coefficient(self) -> float:
        """β, taken off the reward for each nat."""

    def updated(self, kl: float, num_completions: int) -> KLController:
        """After a batch whose completions had a mean KL of `kl` nats each."""


@dataclass(frozen=True, slots=True)
class FixedKL:
    """Always the same."""

    coefficient: float

    def updated(self, kl: float, num_completions: int) -> FixedKL:
        return self


@dataclass(frozen=True, slots=True)
class AdaptiveKL:
    """Steers the KL of a completion towards a target, in log space (Ziegler et al., arXiv 1909.08593, section 2.2).

    e = clip(KL / target − 1, −0.2, 0.2);  β ← β · (1 + e · n / horizon)
    """

    coefficient: float
    target: float
    """Nats a completion."""
    horizon: float
    """Completions over which an error is made up for."""

    def updated(self, kl: float, num_completions: int) -> Self:
        error = min(max(kl / self.target - 1.0, -ERROR_BOUND), ERROR_BOUND)
        return replace(self, coefficient=self.coefficient * (1.0 + error * num_completions / self.horizon))
