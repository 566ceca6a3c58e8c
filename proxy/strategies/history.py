"""What is learnt of each route: its rewards, by running moments and a bounded sample, and how long its answers take."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right, insort
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

_DECAY = 1 - 1 / 512
"""A prompt's weight after one more prompt: some 500 of the latest count, so that the figures follow a change."""
_SAMPLE_SIZE = 1024
_PRIOR_WEIGHT = 4.0
"""Prompts of one route differ in how far their candidates scatter: a few rewards of its own soon outweigh the rest."""


@dataclass(frozen=True, slots=True)
class Prior:
    """What is known of a prompt's rewards before any of them: each prompt has a mean of its own, drawn from
    N(`mean`, `between_variance`), and its candidates scatter around that with `within_variance`."""

    mean: float
    between_variance: float
    within_variance: float
    weight: float
    """How many degrees of freedom of a prompt's own variance the learnt one is worth."""
    sample: Sequence[float] = ()
    """Latest rewards of the route over all prompts, in ascending order."""

    def exceeding(self, reward: float) -> float:
        """The share of the sample over `reward`; 0 without one."""
        return 1 - bisect_right(self.sample, reward) / len(self.sample) if self.sample else 0.0


class LatestValues:
    """A bounded number of the latest values."""

    def __init__(self, most: int = _SAMPLE_SIZE) -> None:
        self._most = most
        self._latest: deque[float] = deque()
        self.ordered: list[float] = []
        """In ascending order; changes as values come."""

    def __len__(self) -> int:
        return len(self.ordered)

    def keep(self, value: float) -> None:
        insort(self.ordered, value)
        self._latest.append(value)
        if len(self._latest) > self._most:
            del self.ordered[bisect_left(self.ordered, self._latest.popleft())]

    def quantile(self, share: float) -> float:
        """The least value that so large a share of them does not exceed. There must be some."""
        return self.ordered[max(0, math.ceil(share * len(self.ordered)) - 1)]


class RewardHistory:
    """Exponentially decayed moments over prompts: sums of squares of two levels, as in an analysis of variance."""

    def __init__(self) -> None:
        # It starts as if a few prompts on the scale of normalised rewards (variance 1 in all) had been seen.
        self._prompts = 4.0
        self._mean = 0.0
        self._between_squares = 4.0 * (0.5 + 0.5 / 4)
        self._inverse_counts = 4.0 / 4
        self._freedom = 4.0
        self._within_squares = 4.0 * 0.5
        self._sample = LatestValues()

    def observe(self, rewards: Sequence[float]) -> None:
        """The rewards of one prompt's candidates, drawn without regard to each other's. Other than finite: ignored."""
        known = [reward for reward in rewards if math.isfinite(reward)]
        if not known:
            return
        mean = math.fsum(known) / len(known)
        self._freedom = _DECAY * self._freedom + len(known) - 1
        self._within_squares = _DECAY * self._within_squares + math.fsum((reward - mean) ** 2 for reward in known)
        # Welford's update with decaying weights.
        self._prompts = _DECAY * self._prompts + 1
        step = (mean - self._mean) / self._prompts
        self._between_squares = _DECAY * self._between_squares + (mean - self._mean) * (mean - self._mean - step)
        self._inverse_counts = _DECAY * self._inverse_counts + 1 / len(known)
        self._mean += step
        for reward in known:
            self._sample.keep(reward)

    def prior(self) -> Prior:
        """To be used at once: its sample changes with the history."""
        within = self._within_squares / self._freedom
        # The means of few candidates scatter by themselves too: Var(mean) = between + within × E[1/count].
        between = self._between_squares / self._prompts - within * self._inverse_counts / self._prompts
        within = max(within, _LEAST_VARIANCE)
        return Prior(self._mean, max(between, 0.01 * within), within, _PRIOR_WEIGHT, self._sample.ordered)


_LEAST_VARIANCE = 1e-12
"""A reward model that gives one number for all leaves nothing to divide by."""


@dataclass(slots=True)
class Histories:
    """Lives as long as the server. Its keys come from configuration, which bounds it."""

    _rewards: dict[tuple[str, str], RewardHistory] = field(default_factory=dict)
    _durations: dict[str, LatestValues] = field(default_factory=dict)

    def rewards(self, route: str, reward_model: str) -> RewardHistory:
        return self._rewards.setdefault((route, reward_model), RewardHistory())

    def durations(self, route: str) -> LatestValues:
        """Seconds from the beginning of a draw to each of its answers."""
        return self._durations.setdefault(route, LatestValues())
