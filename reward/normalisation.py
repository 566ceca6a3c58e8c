"""From the head's raw number to a reward people can set a threshold on.

A Bradley-Terry model is fixed only up to a constant (and trained only up to a scale), so raw rewards mean
nothing by themselves. Rewards served have mean 0 and deviation 1 over reference completions, as
InstructGPT (arXiv 2203.02155, app. C.2) and Ziegler et al. (arXiv 1909.08593) normalise theirs, and a
percentile says how many of those references a completion beats.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

NUM_QUANTILES = 101


@dataclass(frozen=True, slots=True)
class Normalisation:
    """Scale and quantiles of one reward model over its reference completions."""

    mean: float = 0.0
    std: float = 1.0
    quantiles: tuple[float, ...] = ()
    """Normalised rewards at 0 %, 1 %, … 100 % of the references, ascending; empty without references."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.mean) and math.isfinite(self.std) and self.std > 0):
            raise ValueError(f"mean {self.mean} and std {self.std} must be finite, std above 0")
        if self.quantiles and len(self.quantiles) != NUM_QUANTILES:
            raise ValueError(f"{len(self.quantiles)} quantiles, {NUM_QUANTILES} expected")
        if any(b < a for a, b in zip(self.quantiles, self.quantiles[1:], strict=False)):
            raise ValueError("quantiles must ascend")

    @classmethod
    def fit(cls, raw_rewards: Sequence[float]) -> Normalisation:
        """From the raw rewards of the reference completions. Raises ValueError under two different rewards."""
        count = len(raw_rewards)
        mean = math.fsum(raw_rewards) / max(count, 1)
        variance = math.fsum((r - mean) ** 2 for r in raw_rewards) / max(count, 1)
        if count < 2 or variance == 0:
            raise ValueError("normalising needs reference completions with at least two different rewards")
        std = math.sqrt(variance)
        return cls(mean, std, _quantiles(sorted((r - mean) / std for r in raw_rewards)))

    @classmethod
    def with_quantiles_of(cls, rewards: Sequence[float]) -> Normalisation:
        """For rewards that are on a scale already: it stays, and percentiles are those among `rewards`, one or more."""
        return cls(quantiles=_quantiles(sorted(rewards)))

    def reward(self, raw_reward: float) -> float:
        """Normalised reward."""
        return (raw_reward - self.mean) / self.std

    def percentile(self, reward: float) -> float | None:
        """Share of references, in % from 0 to 100, that a normalised reward beats; interpolated."""
        if not self.quantiles:
            return None
        if reward <= self.quantiles[0]:
            return 0.0
        if reward >= self.quantiles[-1]:
            return 100.0
        # Where quantiles are equal (many references share one reward), the middle of the run.
        low = bisect_left(self.quantiles, reward)
        high = bisect_right(self.quantiles, reward)
        if low != high:
            return (low + high - 1) / 2
        left, right = self.quantiles[low - 1], self.quantiles[low]
        return low - 1 + (reward - left) / (right - left)

    def at_percentile(self, percentile: float) -> float | None:
        """The normalised reward that `percentile` % (0 to 100) of the references fall under."""
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile {percentile} is outside 0 to 100")
        return _quantile(self.quantiles, percentile / 100) if self.quantiles else None


def _quantiles(ordered: Sequence[float]) -> tuple[float, ...]:
    return tuple(_quantile(ordered, q / (NUM_QUANTILES - 1)) for q in range(NUM_QUANTILES))


def _quantile(ordered: Sequence[float], share: float) -> float:
    """Linear interpolation between order statistics (Hyndman & Fan's type 7, numpy's default)."""
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    # Clamped: rounding may carry the sum past the upper neighbour, and quantiles must ascend.
    return min(ordered[low] + (ordered[high] - ordered[low]) * (position - low), ordered[high])
