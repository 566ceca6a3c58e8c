"""Whether another candidate is expected to pay: the decisions of `adaptive`. Pure; no I/O, no clock.

Drawing candidates of a prompt until one is good enough is Pandora's problem: each box costs c to open and holds a
reward X. Weitzman (1979, "Optimal Search for the Best Alternative", Econometrica 47) showed that with a known law of X
it is optimal to open another box as long as

    E[max(X - best, 0)] ≥ c                                                                                       (1)

where `best` is the best reward so far. Kalayci, Raman & Dughmi (2025, "Optimal Stopping vs Best-of-N for
Inference-Time Optimization", arXiv 2510.01394) apply it to language models, where the law must be learnt while
drawing. Here, other than in their paper:

1. The law is a mixture. One part is normal, its mean and variance shrunk from this prompt's rewards towards what is
   usual on the route (what is not known of the mean widens it, which is as optimistic as their upper confidence
   bounds, and fades as candidates come). The other is the route's own sample of rewards: reward models have a ceiling,
   which a normal tail does not know. Its share falls from 1 as m / (m + k) with k candidates, as in the predictive law
   of a Dirichlet process. `benchmarks/strategies.py` compares the mixture with its parts.
2. Candidates come in waves, for latency. A wave holds as many as each pay for themselves, given the others before it:
   E[max(X_j - max(best, X_1 … X_{j-1}), 0)] ≥ c. For the first that is (1), so that waves of 1 are Weitzman's rule.
3. c is counted in deviations of a prompt's rewards on the route, since reward models differ in scale.
4. Where n answers are wanted, `best` is the n-th best: that is the one which the next would push out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from proxy.strategies.history import Prior

_STEPS = 96
_SPAN = 9.0
"""Simpson's rule over the upper tail: so many intervals, up to so many deviations."""
_ROUTE_SHARE = 4.0
"""m above: candidates after which the prompt's own rewards count as much as the route's."""
_SAMPLE_HALF = 32
"""Rewards in the route's sample at which m has half its size: a handful says nothing of a ceiling."""


@dataclass(frozen=True, slots=True)
class Belief:
    """The law of the next candidate's reward, and how probable it is that it is valid at all."""

    mean: float
    deviation: float
    valid: float = 1.0
    route_share: float = 0.0
    """Of the route's sample in the mixture; the rest is the normal law."""

    def exceeding(self, reward: float, prior: Prior) -> float:
        """P(the next is valid and its reward over `reward`)."""
        tail = 0.5 * math.erfc((reward - self.mean) / (self.deviation * math.sqrt(2)))
        if self.route_share:
            tail += self.route_share * (prior.exceeding(reward) - tail)
        return self.valid * tail


def believe(rewards: Sequence[float], num_drawn: int, prior: Prior) -> Belief:
    """The law of the next reward after `num_drawn` candidates, of which the valid ones got `rewards`."""
    count = len(rewards)
    own_mean = math.fsum(rewards) / count if count else prior.mean
    squares = math.fsum((reward - own_mean) ** 2 for reward in rewards)
    # Inverse-gamma for the variance, with the route's as its centre.
    within = (prior.weight * prior.within_variance + squares) / (prior.weight + max(count - 1, 0))
    precision = 1 / prior.between_variance + count / within
    mean = (prior.mean / prior.between_variance + count * own_mean / within) / precision
    route = _ROUTE_SHARE * len(prior.sample) / (len(prior.sample) + _SAMPLE_HALF)
    return Belief(
        mean=mean,
        deviation=math.sqrt(within + 1 / precision),
        valid=(count + 1) / (num_drawn + 1),
        route_share=route / (route + count) if route else 0.0,
    )


def expected_gains(best: float, belief: Belief, prior: Prior, most: int) -> list[float]:
    """E[max(M - best, 0)], M the best of j more, for j from 1 to `most`: integrals of P(M > x) over x > best."""
    low, high = belief.mean - _SPAN * belief.deviation, belief.mean + _SPAN * belief.deviation
    if belief.route_share:
        low, high = min(low, prior.sample[0]), max(high, prior.sample[-1])
    if best >= high:
        return [0.0] * most
    # Under all that is possible P(M > x) is constant: no need to integrate there.
    start = max(best, low)
    width = (high - start) / _STEPS
    # P(all of j stay under x) as j times this is exact for the tiniest tails too.
    under = [math.log1p(-min(belief.exceeding(start + step * width, prior), 1 - 1e-16)) for step in range(_STEPS + 1)]
    gains = []
    for draws in range(1, most + 1):
        heights = [-math.expm1(draws * one) for one in under]
        inside = 4 * math.fsum(heights[1:-1:2]) + 2 * math.fsum(heights[2:-1:2])
        gains.append(width / 3 * (heights[0] + heights[-1] + inside) + (start - best) * heights[0])
    return gains


def next_wave(
    rewards: Sequence[float], num_drawn: int, prior: Prior, *, most: int, n: int = 1, stop_cost: float
) -> int:
    """How many candidates to draw next, from 0 (stop) to `most`.

    `rewards` are those of valid candidates among the `num_drawn`; while there are fewer than `n`, a whole wave.
    """
    if len(rewards) < n:
        return most
    best = sorted(rewards, reverse=True)[n - 1]
    cost = stop_cost * math.sqrt(prior.within_variance)
    paid = 0.0
    for draws, gain in enumerate(expected_gains(best, believe(rewards, num_drawn, prior), prior, most)):
        if gain - paid < cost:
            return draws
        paid = gain
    return most
