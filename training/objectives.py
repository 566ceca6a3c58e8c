"""Several objectives in training: which comparisons teach which head, and the scales and the rule of the whole.

A group of comparisons teaches the heads of those objectives that list its source. This is said by its weights for the
heads (`batches.EncodedGroup.head_weights`), as the samples of an ensemble's heads are.

Shapes: N completions, K heads (objectives), M pairs.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from feedback.rankings import ComparisonGroup
from reward.manifest import Objective
from reward.normalisation import Normalisation
from reward.objectives import ObjectiveChoice, ObjectiveRule, rule_for
from training.batches import EncodedGroup, MicroBatch
from training.evaluation import accuracy_of, pair_outcomes
from training.options import OptionsError, RewardOptions


def require_sources(
    train: Sequence[ComparisonGroup], validation: Sequence[ComparisonGroup], objectives: Mapping[str, Sequence[str]]
) -> None:
    """Raises `OptionsError` for a source that teaches nothing, and an objective that nothing teaches."""
    listed = {source for sources in objectives.values() for source in sources}
    for name, groups in (("train", train), ("validation", validation)):
        if lost := sorted({group.source for group in groups} - listed):
            raise OptionsError(f"objectives: none has the source {lost[0]!r} of {name}; there are {sorted(listed)}")
    taught = {group.source for group in train}
    for objective, sources in objectives.items():
        if not taught & set(sources):
            raise OptionsError(f"objectives.{objective}: train holds no comparison of {', '.join(sources)}")


def with_objectives(groups: Sequence[EncodedGroup], objectives: Mapping[str, Sequence[str]]) -> list[EncodedGroup]:
    """The groups with the heads that they are for; unchanged where there are no objectives.

    A group counts as one altogether, shared by its objectives. Losses are means over heads, hence times K.
    """
    if not objectives:
        return list(groups)
    weighted = []
    for group in groups:
        own = [group.source in sources for sources in objectives.values()]
        weighted.append(replace(group, head_weights=tuple(is_own * len(own) / sum(own) for is_own in own)))
    return weighted


def rewards_by_own_heads(rewards: Tensor, batch: MicroBatch) -> Tensor:
    """The mean over the heads that a completion's comparisons count for: `rewards` (N, K) -> (N,)."""
    seen = (batch.head_weights.to(rewards.device) > 0).to(rewards.dtype).T  # (M, K)
    own = torch.zeros_like(rewards)  # (N, K)
    own[batch.better.to(rewards.device)] = seen
    own[batch.worse.to(rewards.device)] = seen
    return (rewards * own).sum(dim=1) / own.sum(dim=1).clamp(min=1)


def own_rewards(groups: Sequence[EncodedGroup], by_head: Sequence[Sequence[float]]) -> list[float]:
    """The same over whole groups: one reward a completion, group after group, of its K."""
    heads = [[k for k, weight in enumerate(group.head_weights) if weight] for group in groups for _ in group.items]
    return [math.fsum(row[k] for k in own) / len(own) for row, own in zip(by_head, heads, strict=True)]


def measured(
    options: RewardOptions, references: Sequence[ComparisonGroup], by_head: Sequence[Sequence[float]]
) -> tuple[dict[str, Objective], ObjectiveRule]:
    """Scale and accuracy of each objective, and the rule, from the raw rewards by head of the references' completions.

    An objective's own references are the completions of its sources; all, where there are none of these. Accuracies
    are left out for references that the heads were trained on. Raises `OptionsError` for references that all have one
    reward, and for a rule that cannot be.
    """
    objectives = {}
    for number, (name, sources) in enumerate(options.objectives.items()):
        groups, rewards = _of_sources(references, by_head, sources, number)
        accuracy = accuracy_of(pair_outcomes(groups, rewards)) if groups and options.validation else None
        own = rewards or [row[number] for row in by_head]
        try:
            scale = Normalisation.fit(own)
        except ValueError as error:
            raise OptionsError(f"objectives.{name}: {error}") from error
        objectives[name] = Objective(scale, tuple(sources), len(own), accuracy)
    scales = {name: objective.normalisation for name, objective in objectives.items()}
    choice = ObjectiveChoice(options.objective_weights or None, options.floors)
    try:
        return objectives, rule_for(choice, scales)
    except ValueError as error:
        raise OptionsError(str(error)) from error


def _of_sources(
    groups: Sequence[ComparisonGroup], by_head: Sequence[Sequence[float]], sources: Sequence[str], head: int
) -> tuple[list[ComparisonGroup], list[float]]:
    """The groups of these sources, and their completions' rewards by this head."""
    kept, rewards, position = [], [], 0
    for group in groups:
        if group.source in sources:
            kept.append(group)
            rewards += [row[head] for row in by_head[position : position + group.num_completions]]
        position += group.num_completions
    return kept, rewards
