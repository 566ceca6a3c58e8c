"""What PPO learns from a batch of completions: rewards and advantages, then epochs of clipped updates.

No model here: a `Learner` evaluates completions and takes the gradient steps. The trainer's is a language model, the
closed-form test's a table.

Shapes: B completions of the whole batch (of all processes), b of one micro-batch, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from pydantic import Field
from torch import Tensor

from training.advantages import explained_variance, generalised_advantages, masked_mean, token_rewards, whiten
from training.kl import k1, k3
from training.losses import clipped_policy_loss, clipped_value_loss
from training.options import Options


class UpdateOptions(Options):
    """The mathematics of PPO. Defaults are those of Ziegler et al. (arXiv 1909.08593) where InstructGPT names none."""

    gamma: float = Field(default=1.0, ge=0, le=1)
    """Discount of later rewards."""
    gae_lambda: float = Field(default=0.95, ge=0, le=1)
    """λ of generalised advantage estimation: 1 trusts only returns, 0 only the value model."""
    clip_range: float = Field(default=0.2, gt=0)
    """ε: how far the ratio of new to old probabilities is followed."""
    value_clip_range: float | None = Field(default=0.2, gt=0)
    """The same for values, in units of reward; None does not clip."""
    whiten_advantages: bool = True
    """Advantages to mean 0 and deviation 1 over the batch's tokens."""
    whiten_rewards: bool = False
    """Per-token rewards to deviation 1, their mean kept. It changes the exchange rate between score and KL."""
    ppo_epochs: int = Field(default=4, ge=1)
    """Passes over each batch of completions. InstructGPT: 1."""
    num_minibatches: int = Field(default=1, ge=1)
    """Optimizer steps in each pass. InstructGPT: 8."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Completions sampled from the policy, with all that the update needs of them."""

    scores: Tensor  # (B,) after scale, clip and penalty for a missing end
    completion_mask: Tensor  # (B, C) True for sampled tokens, the end token included
    logprobs: Tensor  # (B, C) under the policy that sampled, by the forward pass of training
    ref_logprobs: Tensor  # (B, C) under the frozen reference
    values: Tensor  # (B, C) of the value model before the update


@dataclass(frozen=True, slots=True)
class Experience:
    """What the epochs over a batch hold fixed."""

    completion_mask: Tensor  # (B, C)
    old_logprobs: Tensor  # (B, C)
    old_values: Tensor  # (B, C)
    advantages: Tensor  # (B, C) whitened, unless that is off
    returns: Tensor  # (B, C)
    kl: float
    """k1 from the reference, nats a completion, mean over the batch."""
    explained_variance: float
    """Of the returns, by the values before the update."""
    advantage_std: float
    """Before whitening."""


def build_experience(rollout: Rollout, options: UpdateOptions, kl_coef: float) -> Experience:
    """Rewards by token, advantages and returns of a whole batch."""
    mask = rollout.completion_mask
    kl = torch.where(mask, k1(rollout.logprobs, rollout.ref_logprobs), 0.0)
    rewards = token_rewards(rollout.scores, kl, mask, kl_coef)
    if options.whiten_rewards:
        rewards = whiten(rewards, mask, keep_mean=True)
    found = generalised_advantages(rewards, rollout.values, mask, options.gamma, options.gae_lambda)
    mean = masked_mean(found.advantages, mask)
    return Experience(
        completion_mask=mask,
        old_logprobs=rollout.logprobs,
        old_values=rollout.values,
        # Returns come from advantages as they are: whitened ones are in no unit of reward.
        advantages=whiten(found.advantages, mask) if options.whiten_advantages else found.advantages,
        returns=found.returns,
        kl=float(kl.sum(dim=1).mean()),
        explained_variance=explained_variance(rollout.values, found.returns, mask),
        advantage_std=masked_mean((found.advantages - mean).square(), mask) ** 0.5,
    )


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Some of the completions under the models as they are now, with gradients."""

    logprobs: Tensor  # (b, C)
    values: Tensor  # (b, C)


LossOf = Callable[[Evaluation, Tensor], Tensor]
"""(evaluation of a micro-batch, its rows (b,)) -> its part of the minibatch's loss."""


@dataclass(frozen=True, slots=True)
class GradNorms:
    """Before clipping."""

    policy: float
    value: float


class Learner(Protocol):
    """Policy and value model under training."""

    def accumulate(self, rows: Tensor, loss_of: LossOf) -> None:
        """Evaluates this process's share of `rows` in micro-batches and adds each one's gradient, once."""

    def step(self) -> GradNorms:
        """One optimizer step of each network on the gradients added up; clips each by itself, then forgets them."""

    def reduce(self, totals: Tensor) -> Tensor:
        """The sum over all processes."""


@dataclass(frozen=True, slots=True)
class UpdateMetrics:
    """Means over the tokens of all epochs and minibatches."""

    steps: int
    policy_loss: float
    value_loss: float
    clip_fraction: float
    """Share of the tokens whose ratio lay outside the clip range."""
    value_clip_fraction: float
    ratio: float
    first_ratio_error: float
    """Mean |ratio − 1| in the first minibatch, before any step: what sampling and training disagree about."""
    update_kl: float
    """k3 from the policy that sampled, nats a token."""
    policy_grad_norm: float
    value_grad_norm: float


def minibatches(num_completions: int, options: UpdateOptions, orders: Sequence[Sequence[int]]) -> Iterator[Tensor]:
    """The rows of each optimizer step: `ppo_epochs` × `num_minibatches` of them, by each epoch's order.

    Accumulation over micro-batches happens within a step and does not change their number.
    """
    assert len(orders) == options.ppo_epochs
    assert num_completions % options.num_minibatches == 0, "minibatches of one size"
    for order in orders:
        yield from torch.tensor(order).chunk(options.num_minibatches)


def update(
    learner: Learner, experience: Experience, options: UpdateOptions, orders: Sequence[Sequence[int]]
) -> UpdateMetrics:
    """All epochs over one batch (Schulman et al., arXiv 1707.06347, algorithm 1). `orders`: of the rows, by epoch."""
    totals = torch.zeros(8, dtype=torch.float64)
    norms: list[GradNorms] = []
    first_tokens = 0
    for rows in minibatches(len(experience.advantages), options, orders):
        # The count of the whole minibatch: a mean of micro-batches' means would favour short completions.
        num_tokens = int(experience.completion_mask[rows].sum())
        first_tokens = first_tokens or num_tokens

        def loss_of(now: Evaluation, own: Tensor, num_tokens: int = num_tokens) -> Tensor:
            policy_loss, value_loss, facts = _losses(now, experience, own, options)
            totals.add_(_sums(policy_loss, value_loss, facts, is_first=not norms))
            return (policy_loss + value_loss) / num_tokens

        learner.accumulate(rows, loss_of)
        norms.append(learner.step())
    assert len(norms) == options.ppo_epochs * options.num_minibatches
    sums = learner.reduce(totals).tolist()
    count = sums[0]
    return UpdateMetrics(
        steps=len(norms),
        policy_loss=sums[1] / count,
        value_loss=sums[2] / count,
        clip_fraction=sums[3] / count,
        value_clip_fraction=sums[4] / count,
        ratio=sums[5] / count,
        first_ratio_error=sums[7] / first_tokens,
        update_kl=sums[6] / count,
        policy_grad_norm=sum(norm.policy for norm in norms) / len(norms),
        value_grad_norm=sum(norm.value for norm in norms) / len(norms),
    )


@dataclass(frozen=True, slots=True)
class _Facts:
    """Of the tokens of a micro-batch (n,)."""

    log_ratio: Tensor
    clipped: Tensor
    value_clipped: Tensor
    update_kl: Tensor


def _losses(
    now: Evaluation, experience: Experience, rows: Tensor, options: UpdateOptions
) -> tuple[Tensor, Tensor, _Facts]:
    device = now.logprobs.device
    mask, old_logprobs, old_values, advantages, returns = (
        tensor[rows].to(device)
        for tensor in (
            experience.completion_mask,
            experience.old_logprobs,
            experience.old_values,
            experience.advantages,
            experience.returns,
        )
    )
    policy_loss = clipped_policy_loss(now.logprobs, old_logprobs, advantages, mask, options.clip_range)
    value_loss = clipped_value_loss(now.values, old_values, returns, mask, options.value_clip_range)
    log_ratio = (now.logprobs.detach() - old_logprobs)[mask]
    moved = (now.values.detach() - old_values)[mask].abs()
    return (
        policy_loss,
        value_loss,
        _Facts(
            log_ratio=log_ratio,
            clipped=(log_ratio.exp() - 1).abs() > options.clip_range,
            value_clipped=moved > (options.value_clip_range or torch.inf),
            update_kl=k3(old_logprobs[mask], now.logprobs.detach()[mask]),
        ),
    )


def _sums(policy_loss: Tensor, value_loss: Tensor, facts: _Facts, *, is_first: bool) -> Tensor:
    """tokens, policy loss, value loss, clipped, values clipped, ratio, update KL, first ratio error."""
    ratio = facts.log_ratio.exp()
    terms = [
        torch.tensor(float(len(ratio))),
        policy_loss.detach(),
        value_loss.detach(),
        facts.clipped.sum(),
        facts.value_clipped.sum(),
        ratio.sum(),
        facts.update_kl.sum(),
        (ratio - 1).abs().sum() * is_first,
    ]
    return torch.stack([term.cpu().double() for term in terms])
