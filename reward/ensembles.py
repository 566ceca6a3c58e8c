"""Several linear heads on one backbone, and the rules by which their rewards become one.

Whoever picks the best of many answers picks their reward model's mistakes too. Heads that were trained on other
samples of the same comparisons disagree where the data say little; a rule that holds disagreement against an answer
is harder to fool (Coste et al., arXiv 2310.02743). Heads on one base share the base's errors: these no rule finds.

Shapes: B completions, D features, K heads.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import cast

from torch import Tensor, nn

from reward.manifest import Aggregate


class ManyHeads(nn.Module, ABC):
    """K linear heads, and one reward that is made of theirs."""

    def __init__(self, members: nn.Linear) -> None:
        super().__init__()
        self.members = members

    def forward(self, pooled: Tensor) -> Tensor:
        """`pooled` (B, D) -> (B, K): each head's reward."""
        return cast(Tensor, self.members(pooled))

    @abstractmethod
    def combine(self, rewards: Tensor) -> Tensor:
        """`rewards` (B, K) -> (B,)."""


class EnsembleHead(ManyHeads):
    """Heads for the same thing; the rule makes one reward of theirs."""

    def __init__(self, members: nn.Linear, rule: Aggregate, std_coefficient: float) -> None:
        super().__init__(members)
        self.rule: Aggregate = rule
        self.std_coefficient = std_coefficient

    def combine(self, rewards: Tensor) -> Tensor:
        return aggregate(rewards, self.rule, self.std_coefficient)


def aggregate(rewards: Tensor, rule: Aggregate, std_coefficient: float) -> Tensor:
    """One reward for each completion: `rewards` (B, K) -> (B,)."""
    if rule == "worst":
        return rewards.amin(dim=-1)
    mean = rewards.mean(dim=-1)
    if rule == "mean":
        return mean
    # Of these K heads themselves, not an estimate for more of them: one head deviates by 0, not by NaN.
    return mean - std_coefficient * rewards.std(dim=-1, correction=0)
