"""Several objectives in one reward model: what each is measured by, and how their rewards become one.

People want more than one thing of an answer, and a sum lets much of the one buy off the lack of another. So the
objectives stay apart, each with a head and a scale of its own, and choosing is constrained: the most helpful among
those that are harmless enough. Llama 2 (arXiv 2307.09288, section 3.2.3) puts its safety and helpfulness models
together in this way, by a threshold of 0.15 on safety; ArmoRM (arXiv 2406.12845) has heads for many objectives.

The one reward keeps an order over all completions (`objective_head.py` computes it):

    wanted    = the weighted mean of the objectives' rewards, each in deviations of its own
    shortfall = by how much the completion misses its floors, at the floor that it misses most

    reward = −3 + elu(wanted + 3)      where it misses none: `wanted` itself from −3 on, squeezed below, over −4 always
           = −5 − shortfall            where it misses one: under −5, the nearest to its floor first

So −4 parts them: as `min_reward` it refuses whatever misses a floor. Nothing here imports torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from reward.normalisation import Normalisation

BOTTOM = -3.0
"""Rewards of completions that meet all floors are squeezed below it."""
LEAST_ACCEPTED = BOTTOM - 1
"""Under all completions that meet their floors, and over all others."""
MOST_REFUSED = BOTTOM - 2
"""Over all completions that miss a floor. A deviation lies between, which is what a truncated answer loses."""

Floor = float | str
"""A reward, or a percentile of the objective's references such as `p20`."""

NAME_PATTERN = r"^[A-Za-z][A-Za-z0-9_-]{0,63}$"


@dataclass(frozen=True, slots=True)
class ObjectiveRule:
    """How the rewards for several objectives become one."""

    weights: Mapping[str, float]
    """Of the objectives in the mean that is wanted high; not all need be in it."""
    floors: Mapping[str, float]
    """Least normalised reward for an objective."""


@dataclass(frozen=True, slots=True)
class ObjectiveChoice:
    """A rule as somebody asks for it."""

    weights: Mapping[str, float] | None = None
    """None: those of the model; where it has none yet, every objective without a floor counts alike."""
    floors: Mapping[str, Floor] | None = None
    """All of them. None: those of the model."""


def rule_for(
    choice: ObjectiveChoice, scales: Mapping[str, Normalisation], own: ObjectiveRule | None = None
) -> ObjectiveRule:
    """The rule that `choice` asks for, of a model with the objectives `scales` whose rule so far is `own`.

    Raises ValueError for an objective that there is not, a weight that is none, and a percentile that says nothing.
    """
    known = ", ".join(scales)
    for setting, given in (("floors", choice.floors or {}), ("objective_weights", choice.weights or {})):
        for name in given:
            if name not in scales:
                raise ValueError(f"{setting}.{name}: no such objective; there are {known}")
    floors = dict(own.floors) if own is not None else {}
    if choice.floors is not None:
        floors = {name: _reward_at(name, floor, scales[name]) for name, floor in choice.floors.items()}
    if choice.weights:
        for name, weight in choice.weights.items():
            if not 0 < weight < float("inf"):
                raise ValueError(f"objective_weights.{name}: {weight} must be a number over 0")
        weights = dict(choice.weights)
    elif own is not None:
        weights = dict(own.weights)
    else:
        weights = dict.fromkeys([name for name in scales if name not in floors] or scales, 1.0)
    return ObjectiveRule(weights, floors)


def _reward_at(name: str, floor: Floor, scale: Normalisation) -> float:
    if not isinstance(floor, str):
        if math.isfinite(floor):
            return float(floor)
    elif re.fullmatch(r"p\d+(\.\d+)?", floor) and float(floor[1:]) <= 100:
        reward = scale.at_percentile(float(floor[1:]))
        if reward is not None:
            return reward
    raise ValueError(f"floors.{name}: {floor!r} must be a number or a percentile from p0 to p100")
