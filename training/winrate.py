"""How often one model's completions beat another's on the same prompts, with and without what length explains.

Pure functions over meetings: one completion of each model, and which was judged better, by a reward model or by people.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from feedback.rankings import ranking_pairs
from feedback.records import Messages, Preference, Ranking
from training.comparison import SIGNIFICANCE, sign_flip_p
from training.evaluation import completion_text, wilson_interval

Floats = NDArray[np.float64]

RESAMPLES = 1000
"""Of the bootstrap."""
PRIOR_STD = 3.0
"""Deviation of the normal priors of the length model: a model that always wins has a finite strength."""
_CELLS_AT_ONCE = 4_000_000
_NEWTON_STEPS = 30
_Z95 = 1.959963984540054


@dataclass(frozen=True, slots=True)
class Meeting:
    """One completion of each model, for one prompt."""

    prompt: int
    score: float
    """1: the first model's is better, 0: the second's, 0.5: neither."""
    length_gap: float
    """Characters of the first less those of the second."""
    reward_gap: float | None = None
    """Reward of the first less that of the second, where a reward model judged."""


@dataclass(frozen=True, slots=True)
class Share:
    """A win rate with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class LengthControlled:
    """The win rate if both models' completions were equally long, by `length_controlled`."""

    win_rate: Share
    length_effect: float
    """φ: what being longer adds to the log odds of winning, at most; negative: what it takes off."""
    extrapolates: bool
    """One model's completions are longer throughout: at equal length nothing was seen."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The first model against the second. Every prompt counts alike, however many meetings it has."""

    models: tuple[str, str]
    judge: str
    prompts: int
    meetings: int
    wins: int
    ties: int
    losses: int
    """Prompts on which the first model won more meetings than it lost, as many, or fewer."""
    win_rate: Share
    """Of the first; ties count half. Wilson's interval."""
    bootstrap: tuple[float, float]
    """The same interval by resampling prompts."""
    p_value: float
    """Two-sided exact sign test over prompts: how likely so uneven a result is between equals."""
    reward_gap: Share | None
    """Mean reward of the first less that of the second; None where people judged."""
    mean_lengths: tuple[float, float]
    """Characters of the two models' completions."""
    length_controlled: LengthControlled

    @property
    def better(self) -> bool:
        """Whether the first is, significantly."""
        return self.win_rate.value > 0.5 and self.p_value < SIGNIFICANCE

    @property
    def verdict(self) -> str:
        """One sentence."""
        first, second = self.models
        if self.p_value >= SIGNIFICANCE:
            return f"no significant difference between {first} and {second}"
        return f"{first} is {'better' if self.win_rate.value > 0.5 else 'worse'} than {second}"


@dataclass(frozen=True, slots=True)
class Sides:
    """The two models' completions of one prompt."""

    prompt: Messages
    first: Sequence[Messages]
    second: Sequence[Messages]

    @property
    def completions(self) -> list[Messages]:
        """Of both, the first model's before the second's."""
        return [*self.first, *self.second]


def meetings_by_reward(sides: Sequence[Sides], rewards: Sequence[Sequence[float]]) -> list[Meeting]:
    """Every completion of the first model with every one of the second's. `rewards`: of each one's `completions`."""
    meetings = []
    for prompt, (side, own) in enumerate(zip(sides, rewards, strict=True)):
        lengths = [len(completion_text(one)) for one in side.completions]
        split = len(side.first)
        for i in range(split):
            for j in range(split, len(own)):
                gap = own[i] - own[j]
                score = 0.5 if gap == 0 else float(gap > 0)
                meetings.append(Meeting(prompt, score, lengths[i] - lengths[j], gap))
    return meetings


def meetings_by_people(
    sides: Mapping[str, Sides], judgements: Sequence[tuple[str, Preference | Ranking]]
) -> tuple[list[Meeting], int]:
    """(meetings, judgements without one): those comparisons that were between one model's completion and the other's.

    Both come by a key of the prompt. Completions are known by their words; those that both models said decide nothing.
    """
    meetings: list[Meeting] = []
    unused = 0
    numbers = {key: number for number, key in enumerate(sides)}
    for key, judgement in judgements:
        found = [] if key not in sides else _meetings_of(judgement, sides[key], numbers[key])
        meetings += found
        unused += not found
    return meetings, unused


def _meetings_of(judgement: Preference | Ranking, sides: Sides, prompt: int) -> list[Meeting]:
    first = {completion_text(one) for one in sides.first}
    second = {completion_text(one) for one in sides.second}
    if isinstance(judgement, Preference):
        texts = [completion_text(judgement.chosen), completion_text(judgement.rejected)]
        ranks: Sequence[int] = [1, 2]
    else:
        texts, ranks = [completion_text(one) for one in judgement.completions], judgement.ranks
    decided = set(ranking_pairs(ranks))
    meetings = []
    for i, mine in enumerate(texts):
        for j, theirs in enumerate(texts):
            if i != j and mine in first - second and theirs in second - first:
                score = 1.0 if (i, j) in decided else 0.0 if (j, i) in decided else 0.5
                meetings.append(Meeting(prompt, score, len(mine) - len(theirs)))
    return meetings


def compare_models(
    models: tuple[str, str], judge: str, meetings: Sequence[Meeting], mean_lengths: tuple[float, float], seed: int = 0
) -> Comparison:
    """The report on these meetings. `seed`: of the resampling. Raises ValueError where there are none."""
    if not meetings:
        raise ValueError("nothing to compare: no prompt has a judged completion of both models")
    numbers = {prompt: place for place, prompt in enumerate(dict.fromkeys(one.prompt for one in meetings))}
    prompts = np.array([numbers[one.prompt] for one in meetings])
    scores = np.array([one.score for one in meetings])
    sizes = np.bincount(prompts)
    by_prompt: Floats = np.bincount(prompts, weights=scores) / sizes
    leads = np.rint(np.bincount(prompts, weights=2 * scores - 1)).astype(int)
    draws = _resamples(len(sizes), seed)
    return Comparison(
        models,
        judge,
        len(sizes),
        len(meetings),
        int((leads > 0).sum()),
        int((leads == 0).sum()),
        int((leads < 0).sum()),
        win_share(by_prompt),
        _central(draws @ by_prompt / len(sizes)),
        sign_flip_p([int(lead) for lead in leads]),
        _mean_gap(meetings, prompts, sizes),
        mean_lengths,
        length_controlled(prompts, scores, np.array([one.length_gap for one in meetings]), draws),
    )


def win_share(scores: Floats) -> Share:
    """The mean of prompts' scores (from 0 to 1), with Wilson's interval.

    The number of trials is that of coin throws whose share would vary as much: with one win or loss a prompt the number
    of prompts, with ties or several meetings a prompt more.
    """
    count, mean = len(scores), float(scores.mean())
    variance = float(scores.var())
    trials = count if variance == 0 else count * mean * (1 - mean) / variance
    low, high = wilson_interval(mean * trials, trials)
    return Share(mean, low, high)


def length_controlled(
    prompts: NDArray[np.int64], scores: Floats, length_gaps: Floats, draws: Floats
) -> LengthControlled:
    """The length-controlled win rate of Dubois et al. 2024 (arXiv 2404.04475, section 3), for two models:

        P(first better) = σ(θ + φ · tanh(length gap / its deviation)),        win rate at equal length = σ(θ)

    Left out is their term for how hard an instruction is, which takes many models to estimate. Fitted by maximum a
    posteriori with a normal prior on θ and φ (`PRIOR_STD`), prompts weighing alike; the interval is over prompts.
    `prompts`: of each meeting, from 0. `draws` (resamples, prompts): how often each prompt is drawn.
    """
    deviation = float(length_gaps.std())
    features: Floats = np.tanh(length_gaps / deviation) if deviation > 0 else np.zeros_like(length_gaps)
    weights: Floats = (1 / np.bincount(prompts))[prompts]
    theta, phi = _fit(features, scores, weights[None])
    at_once = max(1, _CELLS_AT_ONCE // len(scores))
    resampled = [
        _fit(features, scores, draws[start : start + at_once][:, prompts] * weights)[0]
        for start in range(0, len(draws), at_once)
    ]
    low, high = _central(_sigmoid(np.concatenate(resampled)))
    one_sided = bool(length_gaps.min() > 0 or length_gaps.max() < 0)
    return LengthControlled(Share(float(_sigmoid(theta)[0]), low, high), float(phi[0]), one_sided)


def _fit(features: Floats, scores: Floats, weights: Floats) -> tuple[Floats, Floats]:
    """θ and φ, (R,) each, for R weightings (R, M) of the M meetings: Newton's method on a concave objective."""
    theta, phi = np.zeros(len(weights)), np.zeros(len(weights))
    precision = 1 / PRIOR_STD**2
    for _ in range(_NEWTON_STEPS):
        chance = _sigmoid(theta[:, None] + phi[:, None] * features)
        residual, spread = weights * (scores - chance), weights * chance * (1 - chance)
        slope_theta = residual.sum(axis=1) - precision * theta
        slope_phi = residual @ features - precision * phi
        # The 2 × 2 negative Hessian, inverted by hand.
        tt, tp, pp = spread.sum(axis=1) + precision, spread @ features, spread @ features**2 + precision
        determinant = tt * pp - tp * tp
        step_theta = (pp * slope_theta - tp * slope_phi) / determinant
        step_phi = (tt * slope_phi - tp * slope_theta) / determinant
        # Far from the optimum a full step may overshoot; a unit of log odds never does harm.
        size = np.maximum(1.0, np.hypot(step_theta, step_phi))
        theta, phi = theta + step_theta / size, phi + step_phi / size
        if max(np.abs(step_theta).max(), np.abs(step_phi).max()) < 1e-9:
            break
    return theta, phi


def _mean_gap(meetings: Sequence[Meeting], prompts: NDArray[np.int64], sizes: NDArray[np.int64]) -> Share | None:
    gaps = [one.reward_gap for one in meetings]
    if None in gaps:
        return None
    by_prompt = np.bincount(prompts, weights=np.array(gaps, dtype=float)) / sizes
    mean = float(by_prompt.mean())
    error = float(by_prompt.std(ddof=1)) / math.sqrt(len(by_prompt)) if len(by_prompt) > 1 else 0.0
    return Share(mean, mean - _Z95 * error, mean + _Z95 * error)


def _resamples(num_prompts: int, seed: int) -> Floats:
    """How often each prompt is drawn, (resamples, prompts)."""
    rng = np.random.default_rng(seed)
    even = np.full(num_prompts, 1 / num_prompts)
    return rng.multinomial(num_prompts, even, size=RESAMPLES).astype(np.float64)


def _central(values: Floats) -> tuple[float, float]:
    low, high = np.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def _sigmoid(values: Floats) -> Floats:
    tail = np.exp(-np.abs(values))
    found: Floats = np.where(values >= 0, 1, tail) / (1 + tail)
    return found


def mean_length(completions: Sequence[Messages]) -> float:
    """Characters; 0 for no completions."""
    return math.fsum(len(completion_text(one)) for one in completions) / max(len(completions), 1)


def as_json(found: Comparison) -> dict[str, Any]:
    """Plain values, with what the record computes of itself."""
    return asdict(found) | {"better": found.better, "verdict": found.verdict}
