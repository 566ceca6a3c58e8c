"""Reward against KL: what a policy came to, measured alike whoever trained it, and the curve of the best of them.

Curves are drawn over the root of the KL, as those of Gao et al. 2023, §3.1: what a policy gains is near a line in it
while it is small. Over the KL itself a line between two points lies well under a policy that was trained to that KL.

Shapes: B completions, P prompt tokens, C completion tokens, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from training.decoding import decode, uniforms

_BATCH = 256
_STREAM = "frontier"
"""The chance of every measurement: the same draws for all policies."""


@dataclass(frozen=True, slots=True)
class Point:
    """Means over completions of held-out prompts."""

    kl: float
    """From the policy at the start, nats a completion: exact at each token, over the whole vocabulary."""
    reward: float
    error: float = 0.0
    """Standard error of `reward`."""


@torch.no_grad()
def measure(
    policy: Any,
    start: Any,
    prompts: Tensor,
    num_tokens: int,
    score: Callable[[Sequence[Sequence[int]]], Sequence[float]],
) -> Point:
    """Draws `num_tokens` for each of `prompts` (B, P), all of one length, at temperature 1; none ends before."""
    kls: list[float] = []
    rewards: list[float] = []
    for begin in range(0, len(prompts), _BATCH):
        part = prompts[begin : begin + _BATCH]
        chance = uniforms(0, _STREAM, range(begin, begin + len(part)), num_tokens)
        drawn = decode(policy, part.tolist(), chance, temperature=1.0, stop_ids=(), pad_id=0)
        rewards += score(drawn)
        ids = torch.cat([part, torch.tensor(drawn)], dim=1)  # (B, P + C)
        ours, theirs = (
            model(input_ids=ids, logits_to_keep=num_tokens + 1).logits[:, :-1].double().log_softmax(dim=-1)
            for model in (policy, start)
        )  # (B, C, V)
        kls += (ours.exp() * (ours - theirs)).sum(dim=(1, 2)).tolist()
    error = statistics.stdev(rewards) / math.sqrt(len(rewards))
    return Point(statistics.fmean(kls), statistics.fmean(rewards), error)


def mean(points: Sequence[Point]) -> Point:
    """Of policies that differ by chance. They were measured with the same draws, so that errors do not average out."""
    return Point(
        *(statistics.fmean(column) for column in zip(*((p.kl, p.reward, p.error) for p in points), strict=True))
    )


def frontier(points: Sequence[Point]) -> list[Point]:
    """The upper hull over the root of the KL, up to its highest point."""
    hull: list[Point] = []
    for point in sorted(points, key=lambda one: (one.kl, -one.reward)):
        if hull and point.reward <= hull[-1].reward:
            continue
        while len(hull) >= 2 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], point):
            hull.pop()
        hull.append(point)
    return hull


def reward_at(hull: Sequence[Point], kl: float) -> float | None:
    """None outside of what the points reached."""
    for left, right in itertools.pairwise(hull):
        if left.kl <= kl <= right.kl:
            return left.reward + _slope(left, right) * (math.sqrt(kl) - math.sqrt(left.kl))
    return None


def _slope(left: Point, right: Point) -> float:
    width = math.sqrt(right.kl) - math.sqrt(left.kl)
    return (right.reward - left.reward) / width if width else math.inf
