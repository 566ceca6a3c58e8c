"""Scores to per-token rewards, rewards to advantages: pure tensor maths, no I/O.

Shapes: B completions, C completion tokens. `completion_mask` (B, C) is True for the tokens that were sampled, the end
token included; each row is some True and then False. What stands behind a completion is never read, be it NaN.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

MissingEnd = Literal["none", "subtract", "replace"]


@dataclass(frozen=True, slots=True)
class ScoreScale:
    """What happens to a score before it is weighed against the KL: (score − shift) · scale, then clipped.

    All three are constants of the run: dividing by what a batch happens to hold would change the exchange rate
    between score and KL from step to step.
    """

    shift: float = 0.0
    scale: float = 1.0
    clip: float | None = None

    def apply(self, scores: Tensor) -> Tensor:
        """(B,) -> (B,)"""
        scaled = (scores - self.shift) * self.scale
        return scaled if self.clip is None else scaled.clamp(-self.clip, self.clip)


def penalise_missing_end(scores: Tensor, ended: Tensor, penalty: float, mode: MissingEnd) -> Tensor:
    """Scores (B,) of completions of which `ended` (B,) says whether they came to their end token.

    `subtract` takes `penalty` off the others' scores; `replace` gives them −penalty whatever they scored, as Huang et
    al. (arXiv 2403.17031, detail 23) do.
    """
    assert scores.shape == ended.shape
    if mode == "none":
        return scores
    return torch.where(ended, scores, scores - penalty if mode == "subtract" else torch.full_like(scores, -penalty))


def token_rewards(scores: Tensor, kl: Tensor, completion_mask: Tensor, kl_coef: float) -> Tensor:
    """r_t = −β · KL_t, and the score once, on the last token of the completion: (B,), (B, C) -> (B, C).

    InstructGPT (arXiv 2203.02155, eq. 2): their sum over a completion is score − β · log(π / π_ref).
    """
    assert kl.shape == completion_mask.shape
    assert scores.shape == kl.shape[:1]
    _require_prefixes(completion_mask)
    rewards = torch.where(completion_mask, -kl_coef * kl, 0.0)
    last = completion_mask.sum(dim=1) - 1  # (B,)
    rewards[torch.arange(len(last), device=last.device), last] += scores.to(rewards.dtype)
    return rewards


@dataclass(frozen=True, slots=True)
class Advantages:
    """Of every token."""

    advantages: Tensor  # (B, C) not whitened, 0 behind a completion
    returns: Tensor  # (B, C) what the value model shall say, 0 behind a completion


def generalised_advantages(
    rewards: Tensor, values: Tensor, completion_mask: Tensor, gamma: float, gae_lambda: float
) -> Advantages:
    """Generalised advantage estimation (Schulman et al., arXiv 1506.02438, eq. 16), backwards over each completion.

    δ_t = r_t + γ · V_{t+1} − V_t;  A_t = δ_t + γλ · A_{t+1};  R_t = A_t + V_t

    Behind the last token the value is 0: a completion ends there, also one that was cut off at its longest length,
    since its score is for what there is.
    """
    assert rewards.shape == values.shape == completion_mask.shape
    assert 0 <= gamma <= 1
    assert 0 <= gae_lambda <= 1
    rewards = torch.where(completion_mask, rewards, 0.0)
    values = torch.where(completion_mask, values, 0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros_like(values[:, :1])], dim=1)
    deltas = rewards + gamma * next_values - values  # (B, C), 0 behind a completion
    running = torch.zeros_like(deltas[:, 0])
    columns = []
    for delta in reversed(deltas.unbind(dim=1)):
        running = delta + gamma * gae_lambda * running
        columns.append(running)
    advantages = torch.stack(columns[::-1], dim=1)
    return Advantages(advantages, torch.where(completion_mask, advantages + values, 0.0))


def whiten(values: Tensor, mask: Tensor, *, keep_mean: bool = False) -> Tensor:
    """Mean 0 (or as it was) and deviation 1 over the masked tokens, by the biased variance: (B, C) -> (B, C).

    As Ziegler et al. whiten advantages (arXiv 1909.08593, released code), here over the whole batch of completions of
    all processes: the caller has gathered it. Tokens that are all alike become 0. Behind a completion: 0.
    """
    assert values.shape == mask.shape
    mean, variance = _moments(values, mask)
    whitened = (torch.where(mask, values, 0.0).double() - mean) * torch.rsqrt(variance + 1e-8)
    return torch.where(mask, whitened + mean if keep_mean else whitened, 0.0).to(values.dtype)


def masked_mean(values: Tensor, mask: Tensor) -> float:
    """Over the masked tokens."""
    return float(_moments(values, mask)[0])


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> float:
    """1 − Var(returns − values) / Var(returns): 1 is a perfect value model, 0 one that says the same of everything."""
    spread = float(_moments(returns, mask)[1])
    return 1.0 - float(_moments(returns - values, mask)[1]) / spread if spread > 0 else 0.0


def _moments(values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance over the masked tokens, in fp64."""
    kept = values[mask].double()
    mean = kept.mean()
    # Squares of differences, in a second pass: the difference of two large sums would lose what is asked for.
    return mean, (kept - mean).square().mean()


def _require_prefixes(mask: Tensor) -> None:
    assert mask.dtype == torch.bool
    assert bool(mask[:, 0].all()), "a completion has at least one token"
    assert not bool((mask[:, 1:] & ~mask[:, :-1]).any()), "a completion has no holes"
