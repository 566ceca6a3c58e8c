"""A task whose optimum is known: what PPO must converge to, in score and in KL, from the same functions as the trainer.

A completion has R tokens; the policy is a table of logits (R, V), one row a position, and knows nothing else. The score
is the share of tokens in a class, given on the last token; β is the price of a nat. Then each position's optimum is

    π*(a) ∝ π_ref(a) · exp(1[a in class] / (R β))

Shapes: R = C tokens, V vocabulary, B completions.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.kl import exact_kl
from training.ppo_update import (
    Evaluation,
    GradNorms,
    LossOf,
    Rollout,
    UpdateOptions,
    build_experience,
    update,
)

NUM_TOKENS, VOCABULARY, NUM_COMPLETIONS = 8, 16, 512
IN_CLASS = torch.arange(VOCABULARY) < VOCABULARY // 2
LEARNING_RATE, LAST_LEARNING_RATE = 0.05, 5e-4
OPTIONS = UpdateOptions(gae_lambda=1.0, ppo_epochs=4, num_minibatches=4)
"""λ = 1: the value table cannot see tokens, and a smaller λ would then discount the score but not the KL."""


@dataclass(frozen=True)
class Optimum:
    """What a policy scores, and its KL from the reference, in nats a completion."""

    reward: float
    kl: float


def optimum(reference: Tensor, beta: float) -> Optimum:
    """The closed form, for reference logits (R, V)."""
    return measured(reference + IN_CLASS / (NUM_TOKENS * beta), reference)


def measured(logits: Tensor, reference: Tensor) -> Optimum:
    """Of the policy as a table, without chance."""
    log_policy = logits.log_softmax(dim=-1)
    reward = (log_policy.exp() * IN_CLASS).sum(dim=-1).mean()
    return Optimum(float(reward), float(exact_kl(log_policy, reference.log_softmax(dim=-1)).sum()))


class Tables:
    """Policy and value as tables; the `Learner` of the closed form."""

    def __init__(self, reference: Tensor) -> None:
        self.logits = reference.clone().requires_grad_()
        self.table_of_values = torch.zeros(NUM_TOKENS, requires_grad=True)
        self.tokens = torch.zeros(NUM_COMPLETIONS, NUM_TOKENS, dtype=torch.long)
        self.optimizer = torch.optim.Adam([self.logits, self.table_of_values], lr=LEARNING_RATE)

    def logprobs(self, tokens: Tensor) -> Tensor:
        """Of sampled tokens (B, R), in their shape."""
        return logprobs_of(self.logits, tokens)

    def accumulate(self, rows: Tensor, loss_of: LossOf) -> None:
        now = Evaluation(self.logprobs(self.tokens[rows]), self.table_of_values.expand(len(rows), -1))
        loss_of(now, rows).backward()  # type: ignore[no-untyped-call]

    def step(self) -> GradNorms:
        self.optimizer.step()
        self.optimizer.zero_grad()
        return GradNorms(0.0, 0.0)

    def reduce(self, totals: Tensor) -> Tensor:
        return totals


def logprobs_of(logits: Tensor, tokens: Tensor) -> Tensor:
    """(R, V) and (B, R) -> (B, R)"""
    table = logits.log_softmax(dim=-1).expand(len(tokens), -1, -1)
    return table.gather(2, tokens.unsqueeze(-1)).squeeze(-1)


def reference_logits(seed: int) -> Tensor:
    """(R, V)"""
    return torch.randn(NUM_TOKENS, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def learn(beta: float, seed: int, num_iterations: int = 120) -> tuple[Optimum, Optimum]:
    """What PPO comes to, and what it should. Some 3 CPU-seconds."""
    reference = reference_logits(seed)
    tables = Tables(reference)
    generator = torch.Generator().manual_seed(1000 + seed)
    mask = torch.ones(NUM_COMPLETIONS, NUM_TOKENS, dtype=torch.bool)
    for iteration in range(num_iterations):
        share = iteration / max(num_iterations - 1, 1)
        tables.optimizer.param_groups[0]["lr"] = LEARNING_RATE + share * (LAST_LEARNING_RATE - LEARNING_RATE)
        with torch.no_grad():
            drawn = torch.multinomial(tables.logits.softmax(-1), NUM_COMPLETIONS, replacement=True, generator=generator)
            tables.tokens = drawn.T  # (B, R)
            rollout = Rollout(
                scores=IN_CLASS[tables.tokens].float().mean(dim=1),
                completion_mask=mask,
                logprobs=tables.logprobs(tables.tokens),
                ref_logprobs=logprobs_of(reference, tables.tokens),
                values=tables.table_of_values.detach().expand(NUM_COMPLETIONS, -1).clone(),
            )
        experience = build_experience(rollout, OPTIONS, beta)
        orders = [torch.randperm(NUM_COMPLETIONS, generator=generator).tolist() for _ in range(OPTIONS.ppo_epochs)]
        update(tables, experience, OPTIONS, orders)
    return measured(tables.logits.detach(), reference), optimum(reference, beta)
