"""Linear heads for several objectives on one backbone, and the one reward that a rule makes of theirs.

Shapes: B completions, O objectives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from reward.ensembles import ManyHeads
from reward.normalisation import Normalisation
from reward.objectives import BOTTOM, MOST_REFUSED, ObjectiveRule


class ObjectivesHead(ManyHeads):
    """One head an objective. Until it has a rule, which needs their scales, the one reward is the heads' mean."""

    def __init__(self, members: nn.Linear) -> None:
        super().__init__(members)
        self._judge: _Judge | None = None

    def follow(self, rule: ObjectiveRule, scales: Mapping[str, Normalisation]) -> None:
        """From now on rewards are made by this rule. `scales`: by objective, in the order of the heads."""
        self._judge = _Judge.of(rule, scales)

    def combine(self, rewards: Tensor) -> Tensor:
        return rewards.mean(dim=-1) if self._judge is None else self._judge(rewards)


class _Judge:
    """A rule over objectives' scales, as tensors."""

    def __init__(self, means: Sequence[float], stds: Sequence[float], weights: Tensor, floors: Tensor) -> None:
        self._means, self._stds = torch.tensor(means), torch.tensor(stds)  # (O,), (O,)
        self._weights, self._floors = weights / weights.sum(), floors  # (O,), (O,)

    @classmethod
    def of(cls, rule: ObjectiveRule, scales: Mapping[str, Normalisation]) -> _Judge:
        return cls(
            [scale.mean for scale in scales.values()],
            [scale.std for scale in scales.values()],
            torch.tensor([rule.weights.get(name, 0.0) for name in scales]),
            torch.tensor([rule.floors.get(name, -float("inf")) for name in scales]),
        )

    def __call__(self, rewards: Tensor) -> Tensor:
        """Raw rewards of the heads (B, O) -> (B,)."""
        where = rewards.device
        normalised = (rewards - self._means.to(where)) / self._stds.to(where)
        return constrained(normalised, self._weights.to(where), self._floors.to(where))


def constrained(rewards: Tensor, weights: Tensor, floors: Tensor) -> Tensor:
    """Normalised rewards (B, O), weights (O,) that add up to 1, floors (O,) or −∞ -> (B,), as `objectives` has it."""
    wanted = rewards @ weights
    shortfall = (floors - rewards).clamp(min=0).amax(dim=-1)
    # elu(x) = x over 0, e^x − 1 under it; taken apart, so that nothing is lost to rounding where it changes nothing.
    accepted = torch.where(wanted > BOTTOM, wanted, BOTTOM + F.elu(wanted - BOTTOM))
    return torch.where(shortfall > 0, MOST_REFUSED - shortfall, accepted)
